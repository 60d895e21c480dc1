"""Nodes find each other by mDNS (RFC 6762, RFC 6763). A record is a hint, never a sign of life: a killed node leaves its own behind."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass

import ifaddr
from zeroconf import InterfaceChoice, IPVersion, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from flowspec_edge.errors import NodeUnavailableError
from flowspec_edge.net import addresses

SERVICE_TYPE = "_flowspec._tcp.local."
RECORD_MS = 3000
"""How long to ask for the record of a node whose name was heard; on a LAN it comes with the name."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """A node as its record describes it. ``cluster`` is the label that nodes must share to find each other.

    ``fingerprint`` says which cluster key the node has, without telling the key; it is empty where there is none.
    """

    node: str
    host: str
    port: int
    cluster: str
    version: str
    fingerprint: str = ""


class Announcer:
    """Keeps a node's record on the network. Made by :meth:`start`."""

    def __init__(self, zeroconf: AsyncZeroconf, info: AsyncServiceInfo) -> None:
        self._zeroconf = zeroconf
        self._info = info

    @classmethod
    async def start(cls, announcement: Announcement) -> Announcer:
        """Announce a node that listens already; for a host of 0.0.0.0, this machine's address is.

        Raises:
            NodeUnavailableError: no network interface can be used for mDNS.
        """
        info = AsyncServiceInfo(
            SERVICE_TYPE,
            # The node's name is in the record; that of the record is at most 63 bytes long and has no dots.
            f"{announcement.node.replace('.', '-').encode()[:55].decode(errors='ignore')}-{announcement.port}.{SERVICE_TYPE}",
            port=announcement.port,
            addresses=[socket.inet_aton(_address_of(announcement.host))],
            properties={
                "node": announcement.node,
                "cluster": announcement.cluster,
                "version": announcement.version,
                "key": announcement.fingerprint,
            },
        )
        zeroconf = _open_zeroconf(is_loopback=addresses.is_loopback(announcement.host))
        try:
            # Record names are unique by address and port, so probing for a rival would only cost time.
            await (await zeroconf.async_register_service(info, cooperating_responders=True))
        except BaseException:
            await zeroconf.async_close()
            raise
        return cls(zeroconf, info)

    async def close(self) -> None:
        """Take the record back; browsers see it within milliseconds."""
        await (await self._zeroconf.async_unregister_service(self._info))
        await self._zeroconf.async_close()


class Browser:
    """Listens for the nodes of one cluster. Made by :meth:`start`."""

    def __init__(self, zeroconf: AsyncZeroconf, cluster: str, fingerprint: str) -> None:
        self._zeroconf = zeroconf
        self._cluster = (cluster, fingerprint)
        self._found: dict[str, Announcement] = {}  # by record name
        self._asking: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._browser: AsyncServiceBrowser | None = None

    @classmethod
    async def start(cls, cluster: str, fingerprint: str = "", *, is_loopback: bool) -> Browser:
        """Begin to listen, on loopback alone or on every interface.

        Raises:
            NodeUnavailableError: no network interface can be used for mDNS.
        """
        zeroconf = _open_zeroconf(is_loopback=is_loopback)
        browser = cls(zeroconf, cluster, fingerprint)
        browser._browser = AsyncServiceBrowser(zeroconf.zeroconf, SERVICE_TYPE, handlers=[browser._take_change])
        return browser

    @property
    def found(self) -> list[Announcement]:
        """The nodes known now, by name."""
        return sorted(self._found.values(), key=lambda announcement: announcement.node)

    async def wait_for(self, is_enough: Callable[[list[Announcement]], bool], timeout_s: float) -> list[Announcement]:
        """The nodes known once they are enough, or after ``timeout_s``, whatever there is."""
        try:
            async with asyncio.timeout(timeout_s):
                while not is_enough(self.found):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            pass
        return self.found

    async def close(self) -> None:
        if self._browser is not None:
            await self._browser.async_cancel()
        for task in self._asking:
            task.cancel()
        if self._asking:
            await asyncio.wait(self._asking)
        await self._zeroconf.async_close()

    def _take_change(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is ServiceStateChange.Removed:
            self._found.pop(name, None)
            self._changed.set()
            return
        task = asyncio.get_running_loop().create_task(self._ask(zeroconf, name), name=f"mDNS record {name}")
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def _ask(self, zeroconf: Zeroconf, name: str) -> None:
        info = AsyncServiceInfo(SERVICE_TYPE, name)
        if not await info.async_request(zeroconf, RECORD_MS):
            return
        announcement = _announcement_from(info)
        if announcement is None:
            _log.debug("mDNS record %s is not a node's", name)
        elif (announcement.cluster, announcement.fingerprint) == self._cluster:
            self._found[name] = announcement
            self._changed.set()


async def find_nodes(
    cluster: str,
    fingerprint: str = "",
    *,
    num_nodes: int | None = None,
    is_loopback: bool,
    timeout_s: float,
    settle_s: float = 0.0,
) -> list[Announcement]:
    """Look for the nodes of a cluster until ``num_nodes`` are found, or, where it is not said how many there are, for
    ``settle_s`` more after the first.

    Raises:
        NodeUnavailableError: after ``timeout_s`` there is none, or there are fewer than ``num_nodes``.
    """
    browser = await Browser.start(cluster, fingerprint, is_loopback=is_loopback)
    try:
        found = await browser.wait_for(lambda nodes: len(nodes) >= (num_nodes or 1), timeout_s)
        if found and num_nodes is None:
            found = await browser.wait_for(lambda nodes: False, settle_s)
    finally:
        await browser.close()
    where = "on this machine" if is_loopback else "on this network"
    if not found:
        raise NodeUnavailableError(
            f"no node of cluster {cluster} found {where} within {timeout_s:g} s; start one with: flowspec node "
            f"--cluster {cluster}"
        )
    if num_nodes is not None and len(found) < num_nodes:
        names = ", ".join(announcement.node for announcement in found)
        raise NodeUnavailableError(
            f"{len(found)} of {num_nodes} nodes of cluster {cluster} found {where} within {timeout_s:g} s ({names}); "
            "start the others with flowspec node, or ask for fewer with --nodes"
        )
    return found[:num_nodes]


def _open_zeroconf(*, is_loopback: bool) -> AsyncZeroconf:
    # Not InterfaceChoice.Default: it fails on a host without default route, a LAN without router.
    interfaces = ["127.0.0.1"] if is_loopback else InterfaceChoice.All
    try:
        return AsyncZeroconf(interfaces=interfaces, ip_version=IPVersion.V4Only)
    except OSError as cause:
        raise NodeUnavailableError(
            f"mDNS cannot be used here ({cause}); is a network interface up, and may this user open UDP port 5353?"
        ) from cause


def _announcement_from(info: AsyncServiceInfo) -> Announcement | None:
    """What a record says, or None where it is not a node's: anyone on the network may announce anything."""
    try:
        texts = {key.decode(): (value or b"").decode() for key, value in info.properties.items()}
    except UnicodeDecodeError:
        return None
    addresses = info.parsed_addresses(IPVersion.V4Only)
    if not (addresses and info.port and texts.get("node") and "cluster" in texts):
        return None
    return Announcement(
        node=texts["node"],
        host=addresses[0],
        port=info.port,
        cluster=texts["cluster"],
        version=texts.get("version", "unknown"),
        fingerprint=texts.get("key", ""),
    )


def _address_of(host: str) -> str:
    """The IPv4 address to announce for a listener on ``host``."""
    if host == "localhost":
        return "127.0.0.1"
    if host != "0.0.0.0":
        return host
    # The address that packets to the rest of the world leave from; connecting a UDP socket sends nothing.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])
    # A LAN without router: any address will do.
    addresses = [ip.ip for adapter in ifaddr.get_adapters() for ip in adapter.ips if isinstance(ip.ip, str)]
    for address in addresses:
        if not ipaddress.ip_address(address).is_loopback:
            return address
    raise NodeUnavailableError("this machine has no network address to announce; give it one, or leave out --host")
