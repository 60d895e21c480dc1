"""Doctor as users run it, on one machine. tests/cli/test_lan.py has what it takes several hosts to see."""

import json
import secrets

import pytest

from flowspec_edge.core import wire
from flowspec_edge.net.connection import Link
from flowspec_edge.net.discovery import Announcement, Announcer
from flowspec_edge.net.link import LinkServer
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
