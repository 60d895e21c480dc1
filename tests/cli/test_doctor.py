"""Doctor as users run it, on one machine. tests/cli/test_lan.py has what it takes several hosts to see."""

import json
import secrets
from ipaddress import IPv4Interface

import pytest

from flowspec_edge.cli.run_doctor import MAX_SHOWN, print_findings, print_networks
from flowspec_edge.core import wire
from flowspec_edge.core.cluster.diagnosis import READY, Finding
from flowspec_edge.core.cluster.interfaces import CONTAINERS, NO_CARRIER, Interface, judge
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


def test_a_name_cannot_pretend_to_be_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    name = "pi" + " " * 70 + "\u00a0\u2003pi-kitchen at 10.0.0.2:7361, by mDNS: ready"
    forged = Finding(name, "10.0.0.9:1", ("mDNS",), "other key", f"{name} has another", f"flowspec node on {name}")
    print_findings(Neighbourhood(cluster="home", host="0.0.0.0"), None, [forged])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "pi-kitchen" in line] == [
        "pi pi-kitchen at 10.0.0.2:7361, by mDNS: ready at 10.0.0.9:1, by mDNS: other key",
        "  why:  pi pi-kitchen at 10.0.0.2:7361, by mDNS: ready has another",
        "  mend: flowspec node on pi pi-kitchen at 10.0.0.2:7361, by mDNS: ready",
    ]


LAPTOP = judge(
    [
        Interface(index=1, name="lo", is_loopback=True, addresses=(IPv4Interface("127.0.0.1/8"),)),
        Interface(index=2, name="eth0", has_carrier=False),
        Interface(index=3, name="wlan0", addresses=(IPv4Interface("192.168.1.5/24"),)),
        Interface(index=4, name="docker0", kind="bridge", addresses=(IPv4Interface("172.17.0.1/16"),)),
        Interface(index=5, name="veth1", kind="veth", master=4),
    ]
)


def test_it_tells_which_interfaces_are_announced_and_why_others_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    print_networks(Neighbourhood(cluster="home", host="0.0.0.0"), LAPTOP)
    assert capsys.readouterr().out.splitlines() == [
        "  announced: wlan0 192.168.1.5/24",
        f"  not announced: eth0 ({NO_CARRIER})",
        f"  not announced: docker0 172.17.0.1/16 ({CONTAINERS})",
    ]
    print_networks(Neighbourhood(cluster="home", host="172.17.0.1"), LAPTOP)
    assert capsys.readouterr().out.splitlines() == [
        "  announced: docker0 172.17.0.1/16",
        "  not announced: wlan0 192.168.1.5/24 (--host is 172.17.0.1)",
        "  not announced: eth0 (--host is 172.17.0.1)",
    ]
    print_networks(Neighbourhood(cluster="home", host="0.0.0.0"), LAPTOP[1:])
    assert capsys.readouterr().out.startswith("  announced: nothing, so other boards cannot reach this one")
    cards = [Interface(index=n, name=f"wg{n}", kind="wireguard", addresses=(IPv4Interface("10.0.0.1/24"),))
             for n in range(20)]  # fmt: skip
    print_networks(Neighbourhood(cluster="home", host="0.0.0.0"), judge(cards))
    assert capsys.readouterr().out.endswith("... and 8 more that are not (flowspec doctor --json has all)\n")


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
