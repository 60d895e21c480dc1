"""Doctor as users run it, on one machine. tests/cli/test_lan.py has what it takes several hosts to see."""

import json
import secrets

import pytest

from flowspec_edge.cli.run_doctor import MAX_SHOWN, print_findings
from flowspec_edge.core import wire
from flowspec_edge.core.cluster.diagnosis import READY, Finding
from flowspec_edge.net.connection import Link
from flowspec_edge.net.discovery import Announcement, Announcer
from flowspec_edge.net.link import LinkServer
from flowspec_edge.net.neighbourhood import Neighbourhood
from tests.cli.test_commands import run, start
from tests.narrowing import present

pytestmark = pytest.mark.slow


async def test_doctor_tells_a_version_from_a_stale_announcement_from_too_little_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = f"doctor-{secrets.token_hex(4)}"

    async def announce(node: str, port: int) -> Announcer:
        return await Announcer.start(
            Announcement(node=node, host="127.0.0.1", port=port, cluster=cluster, version="9.0")
        )

    async def refuse_nobody(link: Link) -> None:
        await link.wait_closed()

    place = ("--host", "127.0.0.1", "--cluster", cluster)
    small = await start("node", *place, "--name", "pi-small", "--memory", "1", "--json")
    assert await present(small.stdout).readline()
    monkeypatch.setattr(wire, "PROTOCOL_VERSION", 99)  # in this process, not in those of small and doctor
    newer = await LinkServer.start("127.0.0.1", 0, lambda: wire.Welcome("pi-newer", "9.0", 0, []), refuse_nobody)
    ended = await LinkServer.start("127.0.0.1", 0, lambda: wire.Welcome("pi-ended", "9.0", 0, []), refuse_nobody)
    await ended.close()
    records = [await announce("pi-newer", newer.port), await announce("pi-ended", ended.port)]
    try:
        status, out, err = await run("doctor", "--json", *place, "--wait", "8")
    finally:
        for record in records:
            await record.close()
        await newer.close()
        small.terminate()
        await small.communicate()
    assert out, err
    peers = json.loads(out)["peers"]
    found = {peer["node"]: peer for peer in peers if peer["node"].startswith("pi-")}  # others may be on this machine
    assert {node: peer["reason"] for node, peer in found.items()} == {
        "pi-small": "too little memory",
        "pi-newer": "other version",
        "pi-ended": "stale announcement",
    }
    assert "larger --memory" in found["pi-small"]["remedy"]
    assert found["pi-newer"]["remedy"].startswith("pip install --upgrade flowspec-edge here and on pi-newer")
    assert found["pi-ended"]["remedy"].startswith("flowspec node on pi-ended")
    assert not any(peer["is_usable"] for peer in found.values())
    assert status == 1


def finding(number: int, *, is_usable: bool) -> Finding:
    reason, remedy = (READY, "") if is_usable else ("stale announcement", "flowspec node on it")
    return Finding(f"pi-{number:03}", f"10.0.0.{number}:7361", ("mDNS",), reason, "why", remedy)


@pytest.mark.parametrize(("num_ready", "num_lost"), [(3, 12), (13, 200), (0, 13), (256, 0)])
def test_long_lists_are_shortened_and_say_by_how_many(
    num_ready: int, num_lost: int, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = [finding(number, is_usable=True) for number in range(num_ready)]
    findings += [finding(number, is_usable=False) for number in range(num_lost)]
    print_findings(Neighbourhood(cluster="home", host="0.0.0.0"), None, findings)
    out = capsys.readouterr().out
    assert out.count(": ready") == min(num_ready, MAX_SHOWN)
    assert out.count(": stale announcement\n  why:  why\n  mend: ") == min(num_lost, MAX_SHOWN)
    for num, what in ((num_ready, "can be used"), (num_lost, "cannot be used")):
        more = f"... and {num - MAX_SHOWN} more that {what} (flowspec doctor --json has all)"
        assert (more in out) == (num > MAX_SHOWN)
