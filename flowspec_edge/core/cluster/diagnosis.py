"""Finds out why a peer that was heard of cannot be used, and with which command the user can change that."""

from __future__ import annotations

from dataclasses import dataclass

from flowspec_edge.core.cluster import membership as ms
from flowspec_edge.core.cluster.address import Address
from flowspec_edge.core.cluster.membership import Failure, Membership

REACHED, UNRESOLVED = "reached", "unresolved"
"""What the system's neighbour table says of an address: its network card has answered, or has not."""

READY = "ready"
OTHER_CLUSTER = "other cluster label"
LITTLE_MEMORY = "too little memory"
STALE = "stale announcement"
FIREWALL = "firewall"
ISOLATED = "AP isolation suspected"
UNREACHABLE = "unreachable address"
MULTICAST = "multicast blocked"


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What this machine knows besides the peers' answers.

    ``neighbours`` has REACHED or UNRESOLVED for each host that the system's neighbour table knows. ``local_hosts`` are
    the hosts in networks in which this machine has a card. ``needed_bytes`` is the memory that the smallest stage of
    the model needs. ``hears_mdns`` says whether this machine can receive mDNS records at all.
    """

    neighbours: dict[str, str]
    local_hosts: frozenset[str]
    needed_bytes: int = 0
    hears_mdns: bool = True


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found out about one node, or about an address where no node answered.

    ``remedy`` is empty where none is needed.
    """

    node: str
    address: str
    heard_by: tuple[str, ...]
    reason: str
    detail: str
    remedy: str = ""

    @property
    def is_usable(self) -> bool:
        return self.reason in (READY, MULTICAST)


@dataclass(frozen=True, slots=True)
class _Subject:
    """The node or address that a finding is about."""

    node: str
    address: Address
    heard_by: tuple[str, ...]

    @property
    def who(self) -> str:
        return self.node or f"the board at {self.address.host}"

    def finding(self, reason: str, detail: str, remedy: str = "") -> Finding:
        return Finding(self.node, str(self.address), self.heard_by, reason, detail, remedy)


def diagnose(members: Membership, around: Surroundings) -> list[Finding]:
    """A finding for each node heard of, and for each address at which no node answered. Usable nodes come first."""
    findings = [_diagnose_peer(members, peer, around) for peer in members.peers.values()]
    explained = {peer.address for peer in members.peers.values()}
    for record in members.records.values():
        if record.node not in members.peers and not members.own & set(record.addresses):
            findings.append(_diagnose_record(members, record, around))
        explained |= set(record.addresses)
    for address, hint in members.hints.items():
        if address not in explained and hint.failure is not None:
            findings.append(
                _diagnose_failure(_Subject("", address, tuple(sorted(hint.sources))), hint.failure, members, around)
            )
    return sorted(findings, key=lambda finding: (not finding.is_usable, finding.node, finding.address))


def _diagnose_peer(members: Membership, peer: ms.Peer, around: Surroundings) -> Finding:
    subject = _Subject(peer.node, peer.address, tuple(sorted(members.hints[peer.address].sources)))
    free, needed = (num_bytes / 2**20 for num_bytes in (peer.free_memory_bytes, around.needed_bytes))
    if free < needed:
        return subject.finding(
            LITTLE_MEMORY,
            f"it offers {free:.0f} MiB, and the smallest stage of the model needs {needed:.0f} MiB",
            f"end other programs on {peer.node} and start its node again, or give it a larger --memory",
        )
    if around.hears_mdns and not any(record.node == peer.node for record in members.records.values()):
        return subject.finding(
            MULTICAST,
            "it answers, but its mDNS announcement (UDP port 5353 to 224.0.0.251) does not get here: an access point, "
            "a switch or a firewall drops multicast",
            "sudo ufw allow 5353/udp on both boards, or allow multicast in the access point; "
            f"flowspec node --peer {peer.address} works without it",
        )
    return subject.finding(READY, f"version {peer.version}")


def _diagnose_record(members: Membership, record: ms.RecordHeard, around: Surroundings) -> Finding:
    subject = _Subject(record.node, record.addresses[0], (ms.RECORD,))
    if record.fingerprint != members.fingerprint:
        theirs, ours = (f"key {key}" if key else "no key" for key in (record.fingerprint, members.fingerprint))
        if members.fingerprint:
            remedy = f"flowspec key show here; then on {record.node}: flowspec key set KEY && flowspec node"
        else:
            remedy = f"flowspec key show on {record.node}; then here: flowspec key set KEY"
        return subject.finding(ms.OTHER_KEY, f"it has {theirs}, this machine has {ours}", remedy)
    if record.cluster != members.cluster:
        return subject.finding(
            OTHER_CLUSTER,
            f"its label is {record.cluster}, and {members.cluster} is looked for here",
            f"flowspec node --cluster {members.cluster} on {record.node}, or --cluster {record.cluster} here",
        )
    tried = [(address, members.hints[address]) for address in record.addresses if address in members.hints]
    for address, hint in tried:
        if hint.node:
            return subject.finding(
                STALE,
                f"{hint.node} answers at {address} instead: the announcement is of an earlier run, or forged",
                "nothing to mend: what is left of an earlier run ends by itself within 20 minutes",
            )
    failures = [(address, hint.failure) for address, hint in tried if hint.failure is not None]
    if not failures:
        return subject.finding(UNREACHABLE, "it has not answered so far", "flowspec doctor --wait 15")
    address, failure = min(failures, key=lambda one: _MOST_TELLING_FIRST.index(one[1].kind))
    return _diagnose_failure(_Subject(record.node, address, (ms.RECORD,)), failure, members, around)


_MOST_TELLING_FIRST = (
    ms.OTHER_KEY,
    ms.OTHER_VERSION,
    ms.SAME_NAME,
    ms.BROKEN,
    ms.REFUSED,
    ms.TIMED_OUT,
    ms.NO_ROUTE,
    ms.NO_NAME,
)
"""Kinds of failure. Of those at the several addresses of one board, the first in this order is reported."""


def _diagnose_failure(subject: _Subject, failure: Failure, members: Membership, around: Surroundings) -> Finding:
    port, who = subject.address.port, subject.who
    match failure.kind:
        case ms.OTHER_KEY:
            remedy = f"flowspec key show here; then on {who}: flowspec key set KEY && flowspec node"
            return subject.finding(ms.OTHER_KEY, failure.text, remedy)
        case ms.OTHER_VERSION:
            return subject.finding(
                ms.OTHER_VERSION, failure.text, f"pip install --upgrade flowspec-edge here and on {who}"
            )
        case ms.SAME_NAME:
            return subject.finding(ms.SAME_NAME, failure.text, f"flowspec node --name OTHER-NAME on {who}")
        case ms.REFUSED if ms.RECORD in subject.heard_by:
            return subject.finding(
                STALE,
                f"its machine answers, but nothing listens on port {port} there: the announcement is of a node that "
                "has ended",
                f"flowspec node on {who}; the old announcement ends by itself within 20 minutes",
            )
        case ms.REFUSED:
            detail = f"its machine answers, but nothing listens on port {port} there"
            return subject.finding(
                UNREACHABLE, detail, f"flowspec node on {who}, or its other port in --peer HOST:PORT"
            )
        case ms.NO_NAME:
            detail = f"no machine called {subject.address.host} is known"
            return subject.finding(
                UNREACHABLE, detail, "its IP address instead: --peer 192.168.1.20 (hostname -I there)"
            )
        case ms.TIMED_OUT | ms.NO_ROUTE:
            return _diagnose_silence(subject, members, around)
        case _:
            return subject.finding(ms.BROKEN, failure.text, f"flowspec --verbose node on {who} tells more")


def _diagnose_silence(subject: _Subject, members: Membership, around: Surroundings) -> Finding:
    """Explain why there is no answer at all.

    The system's neighbour table tells a firewall from a board that is out of reach.
    """
    host, port, who = subject.address.host, subject.address.port, subject.who
    if host not in around.local_hosts:
        return subject.finding(
            UNREACHABLE,
            f"{host} lies in a network that this machine has no card in, and no router brings packets there",
            f"put both into one network, or start {who} with --host and its address in this one",
        )
    if around.neighbours.get(host) == REACHED:
        return subject.finding(
            FIREWALL,
            f"its machine is there, but drops what comes for port {port}",
            f"sudo ufw allow {port}/tcp on {who} (or the like of its firewall)",
        )
    if ms.RECORD in subject.heard_by or _is_everyone_silent(members, around):
        heard = "its announcement gets here, but" if ms.RECORD in subject.heard_by else "nobody is heard or reached:"
        return subject.finding(
            ISOLATED,
            f"{heard} no packet gets to {host}; access points with client isolation do this",
            "turn off client (AP) isolation, or leave the guest network, in the access point's settings; or use a "
            "cable",
        )
    return subject.finding(
        UNREACHABLE,
        f"no machine has the address {host} at present: it is off, or has another address now",
        f"hostname -I on {who} tells its address; then flowspec node --peer ADDRESS here",
    )


def _is_everyone_silent(members: Membership, around: Surroundings) -> bool:
    """Whether several boards of this network are known, and none of them has given a sign of life."""
    silent = [address for address in members.hints if around.neighbours.get(address.host) == UNRESOLVED]
    return not members.peers and not members.records and len({address.host for address in silent}) > 1
