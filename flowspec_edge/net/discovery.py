"""Announces nodes by mDNS and listens for their records (RFC 6762, RFC 6763).

A record is a hint and never a sign of life: the record of a killed node remains, and anyone may announce anything.
``directory.py`` finds out who is really there.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from zeroconf import Error as ZeroconfError
from zeroconf import IPVersion, ServiceStateChange, Zeroconf
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
        properties = {
            "node": announcement.node,
            "cluster": announcement.cluster,
            "version": announcement.version,
            "key": announcement.fingerprint,
        }
        return await cls.start_record(SERVICE_TYPE, announcement.node, announcement.host, announcement.port, properties)

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
    """Listens for nodes of any cluster. It is made by :meth:`start`."""

    def __init__(self, zeroconf: AsyncZeroconf, tell: Callable[[RecordHeard | RecordGone], None]) -> None:
        self._zeroconf = zeroconf
        self._tell = tell
        self._asking: set[asyncio.Task[None]] = set()
        self._heard: set[str] = set()  # names of records that were told
        self._browser: AsyncServiceBrowser | None = None

    @classmethod
    async def start(cls, tell: Callable[[RecordHeard | RecordGone], None], *, host: str) -> Browser:
        """Begin to listen on the networks of a listener on ``host``, even without a default route.

        ``tell`` is called with each record that is heard, and with each one that is withdrawn.

        Raises:
            NodeUnavailableError: no network interface can be used for mDNS.
        """
        zeroconf = open_zeroconf(host)
        browser = cls(zeroconf, tell)
        browser._browser = AsyncServiceBrowser(zeroconf.zeroconf, SERVICE_TYPE, handlers=[browser._take_change])
        return browser

    async def close(self) -> None:
        """Stop listening. What was heard counts as withdrawn."""
        if self._browser is not None:
            await self._browser.async_cancel()
        for task in self._asking:
            task.cancel()
        if self._asking:
            await asyncio.wait(self._asking)
        await self._zeroconf.async_close()
        for name in self._heard:
            self._tell(RecordGone(name))

    def _take_change(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is ServiceStateChange.Removed:
            self._heard.discard(name)
            self._tell(RecordGone(name))
        elif len(self._asking) < MAX_ASKING:
            is_known = state_change is ServiceStateChange.Updated
            asking = self._ask_twice(zeroconf, name) if is_known else self._ask(zeroconf, name)
            task = asyncio.get_running_loop().create_task(asking, name=f"mDNS record {name}")
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)

    async def _ask_twice(self, zeroconf: Zeroconf, name: str) -> None:
        """At once, when the addresses of before are still in it, and when they have gone."""
        await self._ask(zeroconf, name)
        await asyncio.sleep(FLUSH_S)
        await self._ask(zeroconf, name)

    async def _ask(self, zeroconf: Zeroconf, name: str) -> None:
        try:
            info = AsyncServiceInfo(SERVICE_TYPE, name)
            if not await info.async_request(zeroconf, RECORD_MS):
                return
        except ZeroconfError as cause:  # anyone may announce a name that is none
            _log.debug("mDNS record %r cannot be asked for: %s", name, cause)
            return
        record = _record_from(info)
        if record is None:
            _log.debug("mDNS record %r is not a node's", name)
        else:
            self._heard.add(name)
            self._tell(record)


def _packed(addresses: Sequence[str]) -> list[bytes]:
    try:
        return [ip_address(address).packed for address in addresses]
    except ValueError as cause:
        raise NodeUnavailableError(
            f"mDNS announces addresses, and --host {addresses[0]} is a name; give its address instead"
        ) from cause


def open_zeroconf(host: str) -> AsyncZeroconf:
    """mDNS for a listener on ``host``. Raises NodeUnavailableError where it cannot be used."""
    try:
        return AsyncZeroconf(interfaces=multicast_addresses(host), ip_version=IPVersion.V4Only)
    except (OSError, RuntimeError) as cause:  # RuntimeError: no interface has an address
        raise NodeUnavailableError(
            f"mDNS cannot be used here ({system_words(cause)}); see that a network interface is up and that this user "
            "may open UDP port 5353"
        ) from cause


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
