"""Announces nodes by mDNS and listens for their records (RFC 6762, RFC 6763).

A record is a hint and never a sign of life: the record of a killed node remains, and anyone may announce anything.
``directory.py`` finds out who is really there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from zeroconf import Error as ZeroconfError
from zeroconf import IPVersion, RecordUpdate, RecordUpdateListener, ServiceStateChange, Zeroconf, current_time_millis
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from flowspec_edge.core.cluster.address import Address
from flowspec_edge.core.cluster.membership import RecordGone, RecordHeard
from flowspec_edge.errors import NodeUnavailableError, is_plain, system_words
from flowspec_edge.net.addresses import LOOPBACK, addresses_to_announce, multicast_addresses

SERVICE_TYPE = "_flowspec._tcp.local."
RECORD_MS = 3000
"""How long to ask for the record of a node whose name was heard. On a LAN the record comes with the name."""
FLUSH_S = 1.5
"""How long after a change what a record said before has gone: it is dropped after a second (RFC 6762, 10.2)."""
MAX_ASKING = 64
"""How many records are asked for at a time. Further names are ignored until they are heard again."""
MAX_LABEL_BYTES = 55
"""The longest name of a node in a record's name. DNS allows 63 bytes, and a suffix that makes it unique follows."""

MAX_RECORD_ADDRESSES = 16
"""Addresses that are taken of one record: a board has a few, and whoever forges more must not fill the memory of all.
"""
MAX_NAMES = 512
"""Names of which records are kept, those of printers and the like included, which are heard as well. Anyone may
announce any number of names, each of which costs a kilobyte for the 20 minutes at least that zeroconf keeps it."""
FORGET_S = 5.0
"""How long to keep the next ones at least, where there were more."""
FAR_MS = 1000.0 * 2**32
"""Beyond the life of any record."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """A node and its address. ``cluster`` is the label that nodes must share to find each other.

    ``fingerprint`` says which cluster key the node has, without telling the key; it is empty where there is none.
    """

    node: str
    host: str
    port: int
    cluster: str
    version: str
    fingerprint: str = ""

    @property
    def address(self) -> str:
        """``host:port``, as people write it."""
        return str(Address(self.host, self.port))

    @property
    def properties(self) -> dict[str, str]:
        """What the record says beside the address (RFC 6763, 6)."""
        return {"node": self.node, "cluster": self.cluster, "version": self.version, "key": self.fingerprint}


class Announcer:
    """Keeps a record on the network, a node's for one. It is made by :meth:`start` or :meth:`start_record`."""

    def __init__(self, zeroconf: AsyncZeroconf, info: AsyncServiceInfo, host: str) -> None:
        self._zeroconf = zeroconf
        self._info = info
        self._host = host

    @classmethod
    async def start(cls, announcement: Announcement) -> Announcer:
        """Announce a node that listens already. For the host 0.0.0.0, all addresses of this machine are announced.

        Raises:
            NodeUnavailableError: no network interface can be used for mDNS.
        """
        name, host, port = announcement.node, announcement.host, announcement.port
        return await cls.start_record(SERVICE_TYPE, name, host, port, announcement.properties)

    @classmethod
    async def start_record(
        cls, service_type: str, name: str, host: str, port: int, properties: Mapping[str, str]
    ) -> Announcer:
        """Announce what listens at that port, as :meth:`start` does."""
        label = name.replace(".", "-").encode()[:MAX_LABEL_BYTES].decode(errors="ignore")
        info = AsyncServiceInfo(
            service_type,
            f"{label}-{secrets.token_hex(3)}.{service_type}",  # its own name is in the record
            port=port,
            addresses=_packed(addresses_to_announce(host)),
            properties=dict(properties),
        )
        zeroconf = open_zeroconf(host)
        try:
            # Record names have random suffixes, so probing for the same name elsewhere would only cost time.
            await (await zeroconf.async_register_service(info, cooperating_responders=True))
        except BaseException:
            await zeroconf.async_close()
            raise
        return cls(zeroconf, info, host)

    async def renew(self) -> None:
        """Announce the addresses that this machine has now, on the networks that it is in now.

        Interfaces that look the same are left and joined again, for there may be another cable in them.
        """
        self._info.addresses = _packed(addresses_to_announce(self._host))
        await self._zeroconf.async_update_interfaces([LOOPBACK])
        await self._zeroconf.async_update_interfaces(multicast_addresses(self._host))
        await (await self._zeroconf.async_update_service(self._info))

    async def close(self) -> None:
        """Withdraw the record. Browsers see this within milliseconds."""
        await (await self._zeroconf.async_unregister_service(self._info))
        await self._zeroconf.async_close()


class Browser:
    """Listens for nodes of any cluster, on the networks of a listener on ``host``, even without a default route.

    ``tell`` is called with each record that is heard, and with each one that is withdrawn.

    Raises:
        NodeUnavailableError: no network interface can be used for mDNS.
    """

    def __init__(self, tell: Callable[[RecordHeard | RecordGone], None], *, host: str) -> None:
        self._tell = tell
        self._asking: set[asyncio.Task[None]] = set()
        self._heard: set[str] = set()  # names of records that were told
        self._zeroconf = open_zeroconf(host, when_forgotten=self._browse_again)
        self._browser = self._browse()

    async def close(self) -> None:
        """Stop listening. What was heard counts as withdrawn."""
        await self._browser.async_cancel()
        for task in self._asking:
            task.cancel()
        if self._asking:
            await asyncio.wait(self._asking)
        await self._zeroconf.async_close()
        for name in self._heard:
            self._tell(RecordGone(name))

    def _browse(self) -> AsyncServiceBrowser:
        """Ask who is there, now and from time to time."""
        return AsyncServiceBrowser(self._zeroconf.zeroconf, SERVICE_TYPE, handlers=[self._take_change])

    def _browse_again(self) -> None:
        self._run(self._browser.async_cancel(), "end of an mDNS browser")
        self._browser = self._browse()

    def _run(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    def _take_change(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is ServiceStateChange.Removed:
            self._heard.discard(name)
            self._tell(RecordGone(name))
            return
        is_known = state_change is ServiceStateChange.Updated
        if (not self._take_from_cache(zeroconf, name) or is_known) and len(self._asking) < MAX_ASKING:
            ask = self._ask_twice if is_known else self._ask
            self._run(ask(zeroconf, name), f"mDNS record {name}")

    async def _ask_twice(self, zeroconf: Zeroconf, name: str) -> None:
        """At once, when the addresses of before are still in it, and when they have gone."""
        await self._ask(zeroconf, name)
        await asyncio.sleep(FLUSH_S)
        await self._ask(zeroconf, name)

    def _take_from_cache(self, zeroconf: Zeroconf, name: str) -> bool:
        """Whether the record has come with its name, as that of a node does."""
        with _as_it_is_announced(name):
            info = AsyncServiceInfo(SERVICE_TYPE, name)
            if info.load_from_cache(zeroconf):
                self._take(info)
                return True
        return False

    async def _ask(self, zeroconf: Zeroconf, name: str) -> None:
        with _as_it_is_announced(name):
            info = AsyncServiceInfo(SERVICE_TYPE, name)
            if await info.async_request(zeroconf, RECORD_MS):
                self._take(info)

    def _take(self, info: AsyncServiceInfo) -> None:
        record = _record_from(info)
        if record is None:
            _log.debug("mDNS record %r is not a node's", info.name)
        else:
            self._heard.add(info.name)
            self._tell(record)


@contextlib.contextmanager
def _as_it_is_announced(name: str) -> Iterator[None]:
    """Anyone may announce a name that is none, and zeroconf raises at it."""
    try:
        yield
    except ZeroconfError as cause:
        _log.debug("mDNS record %r cannot be asked for: %s", name, cause)


def _packed(addresses: Sequence[str]) -> list[bytes]:
    try:
        return [ip_address(address).packed for address in addresses]
    except ValueError as cause:
        raise NodeUnavailableError(
            f"mDNS announces addresses, and --host {addresses[0]} is a name; give its address instead"
        ) from cause


class _Forgetter(RecordUpdateListener):
    """Has zeroconf forget all records where it has more than MAX_NAMES, as if the time of all were over.

    A browser is told so of each. Who is there answers the next question, and what was forged has to be forged again.
    """

    def __init__(self, zeroconf: Zeroconf, when_forgotten: Callable[[], None]) -> None:
        super().__init__()
        self._zeroconf, self._when_forgotten = zeroconf, when_forgotten
        self._forgetting: asyncio.TimerHandle | None = None
        self._forgot_at = float("-inf")

    def async_update_records(self, zc: Zeroconf, now: float, records: list[RecordUpdate]) -> None:
        pass  # they are not in the cache yet

    def async_update_records_complete(self) -> None:
        if len(self._zeroconf.cache.cache) > MAX_NAMES and self._forgetting is None:
            loop = asyncio.get_running_loop()
            self._forgetting = loop.call_at(max(loop.time(), self._forgot_at + FORGET_S), self._forget)

    def _forget(self) -> None:
        self._forgetting, self._forgot_at = None, asyncio.get_running_loop().time()
        if self._zeroconf.done:
            return
        _log.debug("more than %d names were announced by mDNS; all are forgotten", MAX_NAMES)
        later, manager = current_time_millis() + FAR_MS, self._zeroconf.record_manager
        expired = self._zeroconf.cache.async_expire(later)
        manager.async_updates(later, [RecordUpdate(record, record) for record in expired])
        manager.async_updates_complete(False)
        self._when_forgotten()


def open_zeroconf(host: str, *, when_forgotten: Callable[[], None] = lambda: None) -> AsyncZeroconf:
    """mDNS for a listener on ``host``. It keeps records of MAX_NAMES names at most, and says when it has forgotten all.

    Raises:
        NodeUnavailableError: it cannot be used.
    """
    try:
        zeroconf = AsyncZeroconf(interfaces=multicast_addresses(host), ip_version=IPVersion.V4Only)
    except (OSError, RuntimeError) as cause:  # RuntimeError: no interface has an address
        raise NodeUnavailableError(
            f"mDNS cannot be used here ({system_words(cause)}); see that a network interface is up and that this user "
            "may open UDP port 5353"
        ) from cause
    zeroconf.zeroconf.async_add_listener(_Forgetter(zeroconf.zeroconf, when_forgotten), None)
    return zeroconf


def _record_from(info: AsyncServiceInfo) -> RecordHeard | None:
    """The contents of a record; None where it is not a node's.

    Anyone may announce anything, and what is taken here is shown: names of nodes have no characters that a terminal
    obeys.
    """
    try:
        texts = {key.decode(): (value or b"").decode() for key, value in info.properties.items()}
    except UnicodeDecodeError:
        return None
    if not all(is_plain(texts.get(key, "")) for key in ("node", "cluster", "key", "version")):
        return None
    hosts = info.parsed_addresses(IPVersion.All)[:MAX_RECORD_ADDRESSES]
    if not (hosts and info.port and texts.get("node") and "cluster" in texts):
        return None
    return RecordHeard(
        name=info.name,
        node=texts["node"],
        addresses=tuple(Address(host, info.port) for host in hosts),
        cluster=texts["cluster"],
        fingerprint=texts.get("key", ""),
        version=texts.get("version", "unknown"),
    )
