"""What ``flowspec support`` collects, section by section, and what it replaces in all of it."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import importlib.metadata
import ipaddress
import os
import platform
import re
import resource
import socket
import stat
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flowspec_edge.errors import FlowspecError
from flowspec_edge.files import state_directory
from flowspec_edge.version import __version__

COMMAND_S = 40.0
"""How long a command may take; doctor looks around for some seconds."""
LOG_LINES = "1000"
PACKAGES = (
    *("aiohttp", "cryptography", "ifaddr", "jinja2", "msgpack", "msgspec", "numpy", "onnxruntime", "prometheus_client"),
    *("rich", "segno", "tokenizers", "zeroconf"),
)
MIN_NAME = 2
"""Shorter names would be found within words."""
_KEY = re.compile(r"fs[ka]1(?:[-\s]?[a-z0-9]{4}){8,9}[-\s]?[a-z0-9]{0,4}", re.IGNORECASE)
_SECRET = re.compile(r"(?i)((?:api[-_]?key|token|secret|password|authorization)[\"']?\s*[:=]\s*[\"']?)[^\s\"',]+")
_ADDRESS = re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b")
_HARDWARE = re.compile(r"\b(?:[0-9a-f]{2}:){5}[0-9a-f]{2}\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Redaction:
    """What is replaced: keys, what is named a secret, hardware and public addresses, and ``names`` by what stands for
    them.
    """

    names: Mapping[str, str]
    told = "keys, hardware and public addresses, and the names of this machine and its user"

    @classmethod
    def of_this_machine(cls) -> Redaction:
        names = {str(Path.home()): "~", socket.gethostname(): "HOST", socket.gethostname().partition(".")[0]: "HOST"}
        with contextlib.suppress(OSError, KeyError):
            names[getpass.getuser()] = "USER"
        kept = {"root", "localhost"}  # they name nobody
        return cls({name: stands for name, stands in names.items() if len(name) >= MIN_NAME and name not in kept})

    def apply(self, text: str) -> str:
        text = _SECRET.sub(r"\1[secret]", _KEY.sub("[key]", text))
        text = _ADDRESS.sub(_public_address, _HARDWARE.sub("[hardware address]", text))
        for name in sorted(self.names, key=len, reverse=True):
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", self.names[name], text)
        return text


def _public_address(found: re.Match[str]) -> str:
    try:
        return "[public address]" if ipaddress.ip_address(found[0]).is_global else found[0]
    except ValueError:  # a version number
        return found[0]


async def _versions(network: Sequence[str]) -> str:
    lines = [f"flowspec-edge {__version__}", f"Python {sys.version}", platform.platform()]
    for name in PACKAGES:
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} is missing")
    return "\n".join([*lines, _text("/etc/os-release")])


async def _machine(network: Sequence[str]) -> str:
    from flowspec_edge.node.sensors import find_sensors

    processor = [line for line in _text("/proc/cpuinfo").splitlines() if not line.startswith(("flags", "Serial"))]
    return "\n".join(
        [
            f"board: {_text('/proc/device-tree/model') or '-'}",
            f"processors that may be used: {len(os.sched_getaffinity(0))}",
            f"open files: {resource.getrlimit(resource.RLIMIT_NOFILE)}",
            *_temperatures(),
            f"power sensors: {', '.join(sensor.name for sensor in find_sensors()) or '-'}",
            *_text("/proc/meminfo").splitlines()[:6],
            *processor[:40],
        ]
    )


def _temperatures() -> list[str]:
    zones = sorted(Path("/sys/class/thermal").glob("thermal_zone*"))
    return [f"{zone.name} {_text(zone / 'type').strip()}: {_text(zone / 'temp').strip()}" for zone in zones]


async def _networks(network: Sequence[str]) -> str:
    from flowspec_edge.net.addresses import read_verdicts

    return "\n".join(map(str, read_verdicts()))


async def _kept(network: Sequence[str]) -> str:
    """Names, sizes and modes of what is kept between runs; not a byte of it."""
    try:
        directory = state_directory()
    except FlowspecError as error:
        return str(error)
    lines = [f"{directory}", *(f"{name}={value}" for name, value in os.environ.items() if name.startswith("FLOWSPEC_"))]
    for path in sorted(directory.rglob("*")):
        with contextlib.suppress(OSError):
            status = path.lstat()
            lines.append(f"{stat.filemode(status.st_mode)} {status.st_size:10} {path.relative_to(directory)}")
    return "\n".join(lines)


async def _log(network: Sequence[str]) -> str:
    return await _output("journalctl", "--unit", "flowspec-node", "--lines", LOG_LINES, "--no-pager", "--quiet")


def _command(*arguments: str, asks_network: bool = True) -> Callable[[Sequence[str]], Awaitable[str]]:
    """What a command of ours prints."""

    async def collect(network: Sequence[str]) -> str:
        return await _output(sys.executable, "-m", "flowspec_edge", *arguments, *(network if asks_network else ()))

    return collect


SECTIONS: Mapping[str, Callable[[Sequence[str]], Awaitable[str]]] = {
    "versions.txt": _versions,
    "machine.txt": _machine,
    "networks.txt": _networks,
    "kept.txt": _kept,
    "doctor.json": _command("doctor", "--json"),
    "devices.json": _command("devices", "--json"),
    "cache.json": _command("cache", "list", "--json", asks_network=False),
    "server.json": _command("top", "--json", asks_network=False),
    "log.txt": _log,
}


async def _output(*command: str) -> str:
    """Standard output and error of a command, or why it has none."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
    except OSError as cause:
        return f"{command[0]} cannot be run ({cause.strerror})"
    try:
        async with asyncio.timeout(COMMAND_S):
            out, _ = await process.communicate()
    except TimeoutError:
        return f"{command[0]} has not ended within {COMMAND_S:g} s"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return f"{out.decode(errors='replace')}\n(exit status {process.returncode})"


def _text(path: str | Path) -> str:
    """The beginning of a file of the system; empty where there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(2**16).replace("\0", "")
    except OSError:
        return ""
