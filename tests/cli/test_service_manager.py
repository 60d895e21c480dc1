"""What systemd is told, with a socket of ours in its place."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowspec_edge.cli.service_manager import ServiceManager
from tests.cli.test_commands import COMMAND_S
from tests.narrowing import present


class Systemd:
    """The manager's end: the messages that came."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.setblocking(False)

    async def message(self) -> str:
        async with asyncio.timeout(COMMAND_S):
            return (await asyncio.get_running_loop().sock_recv(self._socket, 4096)).decode()

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Systemd]:
    name = f"@flowspec-{secrets.token_hex(6)}" if request.param == "abstract" else str(tmp_path / "notify")
    manager = Systemd(name)
    yield manager
    manager.close()


async def test_it_is_told_of_the_start_of_life_and_of_the_end(systemd: Systemd) -> None:
    environment = {"NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": "30000", "WATCHDOG_PID": str(os.getpid())}
    async with ServiceManager(environment).serving("pi serves on port 7361"):
        assert await systemd.message() == "READY=1\nSTATUS=pi serves on port 7361"
        for _ in range(3):
            assert await systemd.message() == "WATCHDOG=1"
    while (last := await systemd.message()) == "WATCHDOG=1":
        pass
    assert last == "STOPPING=1"


@pytest.mark.parametrize("wanted", [{}, {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "soon"}])
async def test_signs_of_life_are_given_to_whoever_wants_them_of_this_process(
    systemd: Systemd, wanted: dict[str, str]
) -> None:
    async with ServiceManager({"NOTIFY_SOCKET": systemd.address, **wanted}).serving("x"):
        await asyncio.sleep(0.02)
    assert [await systemd.message(), await systemd.message()] == ["READY=1\nSTATUS=x", "STOPPING=1"]


@pytest.mark.parametrize("address", ["", "nowhere", "/nowhere/at/all", "vsock:2:1"])
async def test_without_it_nothing_happens(address: str, caplog: pytest.LogCaptureFixture) -> None:
    async with ServiceManager({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000000"}).serving("x"):
        await asyncio.sleep(0)
    assert ("is not told READY=1" in caplog.text) == address.startswith("/nowhere")


@pytest.mark.slow
async def test_a_node_under_systemd_says_when_it_serves_that_it_lives_and_when_it_ends(tmp_path: Path) -> None:
    systemd = Systemd(str(tmp_path / "notify"))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "flowspec_edge", "node", "--host", "127.0.0.1", "--name", "pi"),
        *("--cluster", f"systemd-{secrets.token_hex(4)}"),
        env={**os.environ, "NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": "300000"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert (await systemd.message()).startswith("READY=1\nSTATUS=pi serves on port ")
        assert await systemd.message() == await systemd.message() == "WATCHDOG=1"
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(COMMAND_S):
            _, err = await process.communicate()
        assert (present(process.returncode), err) == (0, b"")
        while (last := await systemd.message()) == "WATCHDOG=1":
            pass
        assert last == "STOPPING=1"
    finally:
        systemd.close()
        if process.returncode is None:
            process.kill()
            await process.wait()
