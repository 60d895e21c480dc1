"""``flowspec doctor``: who was heard of, who cannot be used, the one reason, and the command that mends it."""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import json
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from flowspec_edge.bundle import Bundle
from flowspec_edge.cli.layout import fitted, terminal_width
from flowspec_edge.core.cluster.diagnosis import MULTICAST, REACHED, UNRESOLVED, Finding, Surroundings, diagnose
from flowspec_edge.core.cluster.interfaces import Verdict
from flowspec_edge.core.cluster.membership import Membership
from flowspec_edge.core.planning.placement import stage_memory_bytes
from flowspec_edge.net.addresses import EVERY_INTERFACE, addresses_to_announce, local_networks, read_verdicts
from flowspec_edge.net.auth import key_path
from flowspec_edge.net.directory import Directory
from flowspec_edge.net.neighbourhood import Neighbourhood
from flowspec_edge.node.resources import unique_name
from flowspec_edge.version import __version__

MAX_SHOWN = 12
"""Nodes that are usable, and nodes that are not, of which lines are printed. More do not fit on a screen."""
NEIGHBOURS = Path("/proc/net/arp")
_COMPLETE = 0x2  # ATF_COM in linux/if_arp.h: the card has answered


async def run_doctor(where: Neighbourhood, bundle: Bundle, *, wait_s: float, is_json: bool) -> int:
    """Listen and ask for ``wait_s``, then print what was found.

    Returns an exit status: 0 where there is nothing to mend.
    """
    async with await Directory.start(where, node=unique_name(), version=__version__) as directory:
        if not is_json:
            print(f"listening and asking for {wait_s:g} s ...", flush=True)
        await asyncio.sleep(wait_s)
        members, mdns_error = directory.membership, directory.mdns_error
        needed = min(stage_memory_bytes([block]) for block in bundle.manifest.blocks)
        around = look_around(members, needed, hears_mdns=mdns_error is None)
        findings = diagnose(members, around)
    if is_json:
        print(json.dumps(_report(where, mdns_error, findings)))
    else:
        print_findings(where, mdns_error, findings)
    return 0 if findings and mdns_error is None and not any(finding.remedy for finding in findings) else 1


def look_around(members: Membership, needed_bytes: int, *, hears_mdns: bool) -> Surroundings:
    """What the system knows of the hosts that were heard of."""
    networks = local_networks().values()
    hosts = {address.host for address in members.hints}
    return Surroundings(
        neighbours=read_neighbours(NEIGHBOURS.read_text() if NEIGHBOURS.exists() else ""),
        local_hosts=frozenset(host for host in hosts if _is_in(host, networks)),
        needed_bytes=needed_bytes,
        hears_mdns=hears_mdns,
    )


def _is_in(host: str, networks: Iterable[ipaddress.IPv4Network]) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return True  # a host name; where it could not be resolved, the failure says so
    return any(address in network for network in networks)


def read_neighbours(table: str) -> dict[str, str]:
    """Whether the network card of each address has answered; ``table`` is what Linux writes to /proc/net/arp."""
    rows = [line.split() for line in table.splitlines()[1:]]
    return {row[0]: REACHED if int(row[2], 16) & _COMPLETE else UNRESOLVED for row in rows if len(row) >= 6}


def _report(where: Neighbourhood, mdns_error: str | None, findings: list[Finding]) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "addresses": addresses_to_announce(where.host),
        "interfaces": [_describe(verdict, where) for verdict in read_verdicts()],
        "cluster": where.cluster,
        "key": where.fingerprint or None,
        "mdns_error": mdns_error,
        "peers": [{**dataclasses.asdict(finding), "is_usable": finding.is_usable} for finding in findings],
    }


def _describe(verdict: Verdict, where: Neighbourhood) -> dict[str, Any]:
    interface = verdict.interface
    return {
        "name": interface.name,
        "kind": interface.kind or None,
        "addresses": [str(address) for address in interface.addresses],
        "why_not": why_not_announced(verdict, where) or None,
    }


def why_not_announced(verdict: Verdict, where: Neighbourhood) -> str:
    """Empty where the interface is announced. A user who gives --host has chosen, whatever the interface is."""
    if where.host == EVERY_INTERFACE:
        return verdict.why_not
    has_host = any(str(address.ip) == where.host for address in verdict.interface.addresses)
    return "" if has_host else f"--host is {where.host}"


def _say(*lines: str) -> None:
    """Print these lines, as narrow as a terminal is."""
    print(fitted("\n".join(lines), terminal_width()))


def print_networks(where: Neighbourhood, verdicts: Sequence[Verdict]) -> None:
    """Which interfaces are announced, and why the others are not, of those that have an address or might have one."""
    announced, others = [], []
    for verdict in verdicts:
        interface, why_not = verdict.interface, why_not_announced(verdict, where)
        text = " ".join([interface.name, *map(str, interface.addresses)])
        if not why_not:
            announced.append(text)
        elif (interface.addresses or interface.is_hardware) and not interface.is_loopback:
            others.append(f"  not announced: {text} ({why_not})")
    nothing = "nothing, so other boards cannot reach this one; see that a cable is in, or Wi-Fi is joined"
    _say(f"  announced: {', '.join(announced) or nothing}", *others[:MAX_SHOWN])
    if len(others) > MAX_SHOWN:
        _say(f"  ... and {len(others) - MAX_SHOWN} more that are not (flowspec doctor --json has all)")


def _close(text: str) -> str:
    """With one space for many. Anyone may announce any name, and one with spaces to the end of a line goes on in what
    looks like another line.
    """
    return " ".join(text.split())


def print_findings(where: Neighbourhood, mdns_error: str | None, findings: list[Finding]) -> None:
    """A line per node, and below it what is wrong and what mends it; of long lists the beginning."""
    key = f"key {where.fingerprint}" if where.fingerprint else f"no cluster key ({key_path()})"
    _say(f"this board: {socket.gethostname()}; cluster {where.cluster}, {key}")
    print_networks(where, read_verdicts())
    if mdns_error is not None:
        _say(f"  mDNS: {mdns_error}")
    for is_usable in (True, False):
        alike = [finding for finding in findings if finding.is_usable is is_usable]
        for finding in alike[:MAX_SHOWN]:
            sources = " and ".join(finding.heard_by)
            _say("", f"{_close(finding.node) or '(unknown)'} at {finding.address}, by {sources}: {finding.reason}")
            if finding.remedy:
                _say(f"  why:  {_close(finding.detail)}")
                print(f"  mend: {_close(finding.remedy)}")  # a command is copied whole
        if len(alike) > MAX_SHOWN:
            what = "can be used" if is_usable else "cannot be used"
            _say("", f"... and {len(alike) - MAX_SHOWN} more that {what} (flowspec doctor --json has all)")
    if not findings:
        _say(
            "",
            "No other node was heard of. Either none runs (flowspec key show prints the line for the other boards), or "
            "multicast is blocked: name one board to see: flowspec doctor --peer 192.168.1.20 (hostname -I there tells "
            "its address). Boards on a guest Wi-Fi never see each other.",
        )
    elif any(finding.reason == MULTICAST for finding in findings):
        _say(
            "",
            "Multicast is blocked between this board and those above; peers remembered and named by --peer still form.",
        )
