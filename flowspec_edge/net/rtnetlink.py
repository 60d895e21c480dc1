"""What Linux says of this machine's network interfaces (rtnetlink(7)), and that something has changed.

The constants are those of linux/netlink.h, linux/rtnetlink.h, linux/if_link.h and linux/if.h.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Interface
from pathlib import Path

from flowspec_edge.core.cluster.interfaces import Interface
from flowspec_edge.errors import plain_text

_NLM_F_REQUEST, _NLM_F_DUMP, _NLM_F_DUMP_INTR = 0x1, 0x300, 0x10
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_RTM_GETLINK, _RTM_GETADDR, _RTM_GETROUTE = 18, 22, 26
_IFLA_IFNAME, _IFLA_LINK, _IFLA_MASTER, _IFLA_LINKINFO, _IFLA_CARRIER_CHANGES, _IFLA_LINK_NETNSID = 3, 5, 10, 18, 35, 37
_IFLA_INFO_KIND = 1
_IFF_UP, _IFF_LOOPBACK, _IFF_POINTOPOINT, _IFF_RUNNING, _IFF_NOARP = 0x1, 0x8, 0x10, 0x40, 0x80
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_OIF, _RTA_MULTIPATH = 4, 9
_RT_TABLE_MAIN, _RTN_UNICAST = 254, 1
_NLA_TYPE_MASK = 0x3FFF
_GROUPS = 0x1 | 0x10 | 0x40
"""RTMGRP_LINK, RTMGRP_IPV4_IFADDR and RTMGRP_IPV4_ROUTE."""
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_LINK, _ADDRESS, _ROUTE, _HOP = (
    struct.Struct("=BxHiII"),  # ifinfomsg: family, device type, index, flags, change
    struct.Struct("=BBBBi"),  # ifaddrmsg: family, prefix length, flags, scope, index
    struct.Struct("=BBBBBBBBI"),  # rtmsg: family, lengths, tos, table, protocol, scope, type, flags
    struct.Struct("=HBBi"),  # rtnexthop: length, flags, hops, index
)
_ANSWER_S = 1.0
"""The kernel answers at once; what stands in its place may never do."""
_MAX_BYTES = 2**17
"""Of one read. The kernel's own pieces of a long answer have 32 KB at most."""
_NUM_TRIES = 5
"""How often a list is asked for again because it changed while it was read."""

Attributes = dict[int, bytes]


def open_socket(*, is_told_of_changes: bool = False) -> socket.socket:
    """Raises OSError, or AttributeError on systems other than Linux."""
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    try:
        opened.bind((0, _GROUPS if is_told_of_changes else 0))
    except BaseException:
        opened.close()
        raise
    return opened


def drain(events: socket.socket) -> None:
    """Forget what has come on a socket that does not block: whoever was told of a change asks how things are now."""
    with contextlib.suppress(BlockingIOError):
        while True:
            try:
                events.recv(_MAX_BYTES)
            except OSError as cause:
                if cause.errno != errno.ENOBUFS:  # so many that some were lost
                    raise


def read_interfaces(devices: Path = Path("/sys/class/net")) -> list[Interface]:
    """This machine's interfaces, in the order of their indexes.

    Raises:
        OSError: the kernel does not tell. Systems other than Linux raise AttributeError.
    """
    try:
        return _read_interfaces(devices)
    except struct.error as cause:
        raise OSError(errno.EPROTO, "rtnetlink tells something else than Linux") from cause


def _read_interfaces(devices: Path) -> list[Interface]:
    with open_socket() as asking:
        asking.settimeout(_ANSWER_S)
        links = [_link(body, attributes) for body, attributes in _dump(asking, _RTM_GETLINK, _LINK)]
        addresses: defaultdict[int, list[IPv4Interface]] = defaultdict(list)
        for body, attributes in _dump(asking, _RTM_GETADDR, _ADDRESS):
            family, prefix, _, _, index = body
            own = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS)
            if family == socket.AF_INET and own is not None:
                addresses[index].append(IPv4Interface((socket.inet_ntoa(own), prefix)))
        gateways = {
            index
            for body, attributes in _dump(asking, _RTM_GETROUTE, _ROUTE)
            if _is_default_route(body)
            for index in _ways(attributes)
        }
    return [
        replace(
            link,
            kind=link.kind or _kind_of_device(devices / link.name),
            addresses=tuple(addresses[link.index]),
            has_default_route=link.index in gateways,
        )
        for link in sorted(links, key=lambda link: link.index)
    ]


def _dump(asking: socket.socket, kind: int, form: struct.Struct) -> list[tuple[tuple[int, ...], Attributes]]:
    """Everything of one kind that the kernel has for IPv4, as the fields of ``form`` and the attributes behind it."""
    for _ in range(_NUM_TRIES):
        asking.send(_HEADER.pack(_HEADER.size + form.size, kind, _NLM_F_REQUEST | _NLM_F_DUMP, 0, 0) + _question(form))
        found, is_whole = [], True
        for flags, payload in _answer(asking):
            is_whole = is_whole and not flags & _NLM_F_DUMP_INTR
            found.append((form.unpack_from(payload), _attributes(payload[form.size :])))
        if is_whole:
            return found
    raise OSError(errno.EINTR, "the network changes faster than it can be read")


def _question(form: struct.Struct) -> bytes:
    """The fields of a question: IPv4, and else zeros."""
    return bytes([socket.AF_INET if form is not _LINK else socket.AF_UNSPEC]) + bytes(form.size - 1)


def _answer(asking: socket.socket) -> Iterator[tuple[int, bytes]]:
    """Flags and payload of each message of an answer."""
    while True:
        data = asking.recv(_MAX_BYTES)
        while len(data) >= _HEADER.size:
            length, kind, flags, _, _ = _HEADER.unpack_from(data)
            payload = data[_HEADER.size : length]
            if kind == _NLMSG_DONE:
                return
            if kind == _NLMSG_ERROR:
                (negative,) = struct.unpack_from("=i", payload)
                raise OSError(-negative, "rtnetlink")
            yield flags, payload
            data = data[max(_aligned(length), _HEADER.size) :]


def _attributes(data: bytes) -> Attributes:
    found: Attributes = {}
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        found[kind & _NLA_TYPE_MASK] = data[4:length]
        data = data[max(_aligned(length), 4) :]
    return found


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def _link(body: tuple[int, ...], attributes: Attributes) -> Interface:
    _, _, index, flags, _ = body
    information = _attributes(attributes.get(_IFLA_LINKINFO, b""))
    return Interface(
        index=index,
        name=_text(attributes.get(_IFLA_IFNAME, b"")),
        kind=_text(information.get(_IFLA_INFO_KIND, b"")),
        is_up=bool(flags & _IFF_UP),
        has_carrier=bool(flags & _IFF_RUNNING),
        is_loopback=bool(flags & _IFF_LOOPBACK),
        has_neighbours=not flags & (_IFF_POINTOPOINT | _IFF_NOARP),
        master=_number(attributes, _IFLA_MASTER),
        # The other side may be in another network namespace, where numbers mean other interfaces.
        lower=0 if _IFLA_LINK_NETNSID in attributes else _number(attributes, _IFLA_LINK),
        num_carrier_changes=_number(attributes, _IFLA_CARRIER_CHANGES),
    )


def _kind_of_device(device: Path) -> str:
    """Modems look like network cards but for this; everything else that a driver makes has no kind."""
    try:
        lines = (device / "uevent").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return ""
    return "wwan" if "DEVTYPE=wwan" in lines else ""


def _is_default_route(body: tuple[int, ...]) -> bool:
    family, length, _, _, table, _, _, kind, _ = body
    return (family, length, table, kind) == (socket.AF_INET, 0, _RT_TABLE_MAIN, _RTN_UNICAST)


def _ways(attributes: Attributes) -> Iterator[int]:
    """The interfaces over which a route leads."""
    if _RTA_OIF in attributes:
        yield _number(attributes, _RTA_OIF)
    hops = attributes.get(_RTA_MULTIPATH, b"")
    while len(hops) >= _HOP.size:
        length, _, _, index = _HOP.unpack_from(hops)
        yield index
        hops = hops[max(_aligned(length), _HOP.size) :]


def _number(attributes: Attributes, kind: int) -> int:
    value = attributes.get(kind, b"")
    return int.from_bytes(value, sys.byteorder) if len(value) == 4 else 0


def _text(value: bytes) -> str:
    return plain_text(value.rstrip(b"\0").decode(errors="backslashreplace"))
