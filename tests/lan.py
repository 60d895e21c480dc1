"""A LAN on this machine: hosts with addresses of their own (network namespaces), a switch between them, and a recording
of what it forwards.

Needs root and iproute2. No default route, as on a LAN without router.
"""

import asyncio
import contextlib
import ctypes
import itertools
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from asyncio.subprocess import Process
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

CLONE_NEWNET = 0x40000000
SO_RCVBUFFORCE = 33
SUBNET = "10.83.0."
SECOND = 100
"""How far a host's second address is from its first."""
_RANDOM, _PASS, _DROP = 0xFFFFF038, 0xFFFFFFFF, 2
"""Of a packet filter: where a random number is loaded from (SKF_AD_RANDOM), and its verdicts (TC_ACT_UNSPEC, _SHOT)."""
_NUMBERS = itertools.count()
"""Each LAN of this process has its own, so that there may be several: none hears anything of another."""
_ALL_SEGMENTS = "65535"
"""As many packets as a card may be given as one, by default (GSO_MAX_SEGS)."""


def why_not() -> str | None:
    """Why there can be no such LAN here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if any(shutil.which(program) is None for program in ("ip", "bridge", "tc")):
        return "network namespaces need iproute2"
    lan = Lan(1)
    try:
        lan.build()
        lan.isolate_clients()
        lan.drop_multicast()
        lan.drop_tcp(0, 7361)
        lan.lose_packets(0, 0.1)
    except subprocess.CalledProcessError as refused:
        return f"this kernel, or this container, allows no LAN of network namespaces: {refused.stderr.strip()}"
    finally:
        lan.remove()
    return None


def ip(*arguments: str, inside: str | None = None) -> None:
    _run("ip", *(("-n", inside) if inside else ()), *arguments)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


class Lan:
    """Hosts 0, 1, ... at 10.83.0.1, 10.83.0.2, ..."""

    def __init__(self, num_hosts: int) -> None:
        self.num_hosts = num_hosts
        self._prefix = f"fs{os.getpid()}-{next(_NUMBERS)}-"
        self.switch = f"{self._prefix}switch"
        self.processes: list[Process] = []
        self._second: set[int] = set()  # hosts that have their second address
        self._swallows: set[int] = set()

    def host(self, number: int) -> str:
        return f"{self._prefix}{number}"

    def address(self, number: int) -> str:
        return f"{SUBNET}{number + 1 + SECOND * (number in self._second)}"

    def build(self) -> None:
        ip("netns", "add", self.switch)
        ip("link", "add", "name", "switch", "type", "bridge", inside=self.switch)
        ip("link", "set", "switch", "up", inside=self.switch)
        for number in range(self.num_hosts):
            host, port = self.host(number), f"port{number}"
            ip("netns", "add", host)
            ip("link", "add", "eth0", "netns", host, "type", "veth", "peer", "name", port, "netns", self.switch)
            ip("link", "set", port, "master", "switch", "up", inside=self.switch)
            ip("address", "add", f"{self.address(number)}/24", "dev", "eth0", inside=host)
            for name in ("lo", "eth0"):
                ip("link", "set", name, "up", inside=host)

    def remove(self) -> None:
        for name in (self.switch, *map(self.host, range(self.num_hosts))):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def on_host(self, number: int, *command: str, text: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command there, with a text on its standard input, and wait for it."""
        where = ["ip", "netns", "exec", self.host(number)]
        return subprocess.run([*where, *command], input=text, check=True, capture_output=True, text=True)

    def isolate_clients(self) -> None:
        """As an access point with client isolation: nobody hears anybody."""
        for number in range(self.num_hosts):
            self._set_port(number, "isolated", "on")

    def drop_multicast(self) -> None:
        """As a network that forwards no multicast: the switch keeps it from every host."""
        for number in range(self.num_hosts):
            self._set_port(number, "mcast_flood", "off")

    def drop_tcp(self, number: int, port: int) -> None:
        """As a firewall on a host: what comes in for this port vanishes, unanswered."""
        self._blackhole(number, "ipproto", "tcp", "dport", str(port))

    def swallow(self, number: int, source: str | None = None) -> None:
        """What comes in from an address, or from all, vanishes, though the link is up."""
        self._blackhole(number, *(("from", source) if source is not None else ()))

    def swallows(self, number: int) -> bool:
        """Whether anything that comes in there vanishes."""
        return number in self._swallows

    def let_through(self, number: int) -> None:
        """Whatever vanished comes in again."""
        host = self.host(number)
        ip("rule", "add", "pref", "0", "table", "local", inside=host)
        ip("rule", "del", "pref", "1", inside=host)
        ip("rule", "del", "pref", "2", inside=host)
        self._swallows.discard(number)

    def _blackhole(self, number: int, *selector: str) -> None:
        """A rule of policy routing does it, so that no firewall has to be installed. Rules are asked before the host's
        own addresses are looked up, which by default are first.
        """
        host = self.host(number)
        ip("rule", "add", "pref", "2", "table", "local", inside=host)
        ip("rule", "add", "pref", "1", "iif", "eth0", *selector, "blackhole", inside=host)
        ip("rule", "del", "pref", "0", inside=host)
        self._swallows.add(number)

    def lose_packets(self, number: int, share: float) -> None:
        """As a bad cable or radio: this share of a host's packets vanishes, in either direction; none where it is 0.

        A filter of four instructions drops them at random, since ``netem`` is not in every kernel. Each end drops what
        comes in, for what an end drops as it goes out is sent again by its own system, which learns of that at once.
        The ends give their cards single packets, of which a card would else make one out of many.
        """
        least = int(share * 2**32)
        code = f"4,32 0 0 {_RANDOM},53 1 0 {least},6 0 0 {_DROP},6 0 0 {_PASS}"
        for namespace, card in ((self.host(number), "eth0"), (self.switch, f"port{number}")):
            where = ["tc", "-n", namespace]
            subprocess.run([*where, "qdisc", "del", "dev", card, "clsact"], capture_output=True)
            ip("link", "set", card, "gso_max_segs", "1" if share else _ALL_SEGMENTS, inside=namespace)
            if share:
                _run(*where, "qdisc", "add", "dev", card, "clsact")
                _run(*where, "filter", "add", "dev", card, "ingress", "bpf", "da", "bytecode", code)

    def readdress(self, number: int) -> None:
        """The host's address becomes the other one of its two."""
        host = self.host(number)
        ip("address", "del", f"{self.address(number)}/24", "dev", "eth0", inside=host)
        self._second ^= {number}
        ip("address", "add", f"{self.address(number)}/24", "dev", "eth0", inside=host)

    def pull(self, number: int) -> None:
        """The cable is out."""
        ip("link", "set", f"port{number}", "down", inside=self.switch)

    def plug(self, number: int) -> None:
        ip("link", "set", f"port{number}", "up", inside=self.switch)

    def add_card(self, number: int, name: str, address: str) -> None:
        """A further interface, as of a Wi-Fi stick, at the same switch."""
        host, port = self.host(number), f"{name}-{number}"
        ip("link", "add", name, "netns", host, "type", "veth", "peer", "name", port, "netns", self.switch)
        ip("link", "set", port, "master", "switch", "up", inside=self.switch)
        ip("link", "set", name, "up", inside=host)
        ip("address", "add", f"{address}/24", "dev", name, inside=host)

    def remove_card(self, number: int, name: str) -> None:
        ip("link", "del", name, inside=self.host(number))

    def _set_port(self, number: int, *setting: str) -> None:
        command = ["bridge", "-n", self.switch, "link", "set", "dev", f"port{number}", *setting]
        subprocess.run(command, check=True, capture_output=True, text=True)

    async def start(self, number: int, *arguments: str, env: Mapping[str, str] | None = None) -> Process:
        """``flowspec`` on a host, as a process."""
        process = await asyncio.create_subprocess_exec(
            *("ip", "netns", "exec", self.host(number), sys.executable, "-m", "flowspec_edge", *arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **(env or {})},
        )
        self.processes.append(process)
        return process

    async def run(self, number: int, *arguments: str, env: Mapping[str, str] | None = None) -> tuple[int, str, str]:
        """Exit status, standard output, standard error."""
        process = await self.start(number, *arguments, env=env)
        out, err = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()

    async def start_node(
        self, number: int, *arguments: str, env: Mapping[str, str] | None = None, is_verbose: bool = False
    ) -> tuple[Process, Any]:
        """A node that serves by the time this returns, and the JSON in which it described itself."""
        command = ("--verbose", "node") if is_verbose else ("node",)
        options = ("--name", f"pi-{number}", "--threads", "1", "--json", "--until-stdin-closes", *arguments)
        process = await self.start(number, *command, *options, env=env)
        assert process.stdout is not None and process.stderr is not None
        line = await process.stdout.readline()
        assert line, (await process.stderr.read()).decode()
        return process, json.loads(line)

    async def stop(self) -> None:
        for process in self.processes:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
        for process in self.processes:
            await process.communicate()


@contextlib.asynccontextmanager
async def lan_of(num_hosts: int) -> AsyncIterator[Lan]:
    lan = Lan(num_hosts)
    try:
        lan.build()
        yield lan
    finally:
        await lan.stop()
        lan.remove()


class Capture:
    """Every frame that the switch forwards; a thread of its own takes them."""

    def __init__(self, lan: Lan) -> None:
        self.frames: list[bytes] = []
        self._is_done = threading.Event()
        opened = threading.Event()
        self._thread = threading.Thread(target=self._listen, args=(lan.switch, opened))
        self._thread.start()
        assert opened.wait(10)

    def _listen(self, namespace: str, opened: threading.Event) -> None:
        with open(f"/run/netns/{namespace}") as file:
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.setns(file.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as sniffer:  # ETH_P_ALL
            sniffer.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 2**26)
            sniffer.settimeout(0.1)
            opened.set()
            while not self._is_done.is_set():
                with contextlib.suppress(TimeoutError):
                    frame, address = sniffer.recvfrom(2**17)
                    if address[0].startswith("port") and address[2] == socket.PACKET_OUTGOING:
                        self.frames.append(frame)

    def close(self) -> None:
        self._is_done.set()
        self._thread.join()

    def streams(self) -> list[bytes]:
        """What went over each TCP connection, by direction."""
        streams: defaultdict[bytes, bytearray] = defaultdict(bytearray)
        for frame in self.frames:
            if frame[12:14] != b"\x08\x00" or frame[23] != 6:  # IPv4, TCP
                continue
            start = 14 + (frame[14] & 15) * 4
            (length,) = struct.unpack(">H", frame[16:18])
            payload = frame[start + (frame[start + 12] >> 4) * 4 : 14 + length if length else None]
            streams[frame[26:34] + frame[start : start + 4]] += payload
        return [bytes(stream) for stream in streams.values()]


@contextlib.contextmanager
def captured(lan: Lan) -> Iterator[Capture]:
    capture = Capture(lan)
    try:
        yield capture
    finally:
        capture.close()
