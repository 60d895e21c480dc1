"""The members of the cluster as one node knows them: addresses heard of, those that answered, and why others did not.

An address is a hint, whether an mDNS record, the user, a file of an earlier run or a peer gave it. A peer is a node
that has answered there with the cluster's key. Each hint is greeted. Peers are greeted again from time to time, so that
lost ones are noticed. Each greeting brings the addresses that the other side knows, so one hint is enough to find all
nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from flowspec_edge.core.cluster.address import Address

MAX_ADDRESSES = 256
"""The most addresses that are kept, more than any home has boards. A further one takes the place of the one heard of
by mDNS or from peers alone that has failed most often, or is ignored."""
MAX_TOLD = 64
"""The most addresses that a greeting exchanges in each direction."""
ALONE_S = 5.0
"""After this time without company something is wrong. The nodes of a LAN see each other 1.2 s after the last start
(zeroconf 0.154, five hosts).
"""
REFRESH_S = 15.0
"""How often a peer is greeted again. A greeting is 2 ms of work, and a board without power is noticed soon enough."""
GOSSIP_S = 0.2
"""How soon a peer is told of another one that it may not know, together with those that are found meanwhile."""
QUIET_S = 0.5
"""How long after the latest peer has joined nobody else is expected: each tells whom it knows, and a query is answered
within a quarter of a second (RFC 6762, 6), so only a board that starts just then is still to come.
"""
GOODBYE_S = 2.0
"""How soon to greet a node that said goodbye. Until then it may still be listening."""
RETRY_S = (1.0, 2.0, 4.0, 8.0, 10.0)
"""The pauses after the first, the second and further failures at an address. The last pause is repeated: with the 5 s
after which a silent address is given up, whoever is back is found within 15 s, even if nothing tells of it.
"""
TOLD_ATTEMPTS = 4
"""After this many failures an address that only peers have told is forgotten."""

RECORD, TYPED, REMEMBERED, TOLD, CALLED = "mDNS", "--peer", "remembered", "told by a peer", "its own call"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why no peer was found at an address. ``kind`` is one of those below, and ``text`` is a sentence for the user."""

    kind: str
    text: str


OTHER_KEY, OTHER_VERSION, REFUSED, TIMED_OUT, NO_ROUTE, NO_NAME, SAME_NAME, BROKEN = (
    *("other key", "other version", "refused", "timed out", "no route", "no such host", "same name", "broken"),
)


@dataclass(frozen=True, slots=True)
class Peer:
    """A node that answered."""

    node: str
    address: Address
    version: str
    free_memory_bytes: int
    bundles: tuple[str, ...] = ()


# --------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class RecordHeard:
    """An mDNS record is new or has changed. ``name`` is the name of the record. All of it may be forged."""

    name: str
    node: str
    addresses: tuple[Address, ...]
    cluster: str
    fingerprint: str
    version: str


@dataclass(frozen=True, slots=True)
class RecordGone:
    name: str


@dataclass(frozen=True, slots=True)
class AddressLearned:
    address: Address
    source: str


@dataclass(frozen=True, slots=True)
class PeerAnswered:
    """The node at ``address`` holds the key, and is on the machine that has the address ``host``. ``known`` are the
    addresses that it told.
    """

    address: Address
    peer: Peer
    known: tuple[Address, ...] = ()
    host: str = ""


@dataclass(frozen=True, slots=True)
class PeerFailed:
    address: Address
    failure: Failure


@dataclass(frozen=True, slots=True)
class PeerDoubted:
    """A link to the peer was lost, and nothing more is known of it."""

    node: str


@dataclass(frozen=True, slots=True)
class NetworksChanged:
    """This machine is in other networks, or was away for a while. Its own addresses are now ``own``."""

    own: frozenset[Address]


@dataclass(frozen=True, slots=True)
class TimePassed:
    """``next_deadline`` has come."""


MembershipEvent = (
    RecordHeard | RecordGone | AddressLearned | PeerAnswered | PeerFailed | PeerDoubted | NetworksChanged | TimePassed
)

# --------------------------------------------------------------------- actions


@dataclass(frozen=True, slots=True)
class GreetPeer:
    address: Address


@dataclass(frozen=True, slots=True)
class ReportJoined:
    peer: Peer


@dataclass(frozen=True, slots=True)
class ReportMoved:
    """The peer answers at another address, and may be gone from ``before``."""

    peer: Peer
    before: Address


@dataclass(frozen=True, slots=True)
class ReportLost:
    peer: Peer
    why: str


@dataclass(frozen=True, slots=True)
class ReportNamesake:
    """Report that another node has this node's name, once per address."""

    text: str


@dataclass(frozen=True, slots=True)
class RememberPeers:
    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class ReportAlone:
    """Report, once, that nobody has answered for ALONE_S."""


MembershipAction = GreetPeer | ReportJoined | ReportMoved | ReportLost | ReportNamesake | RememberPeers | ReportAlone


@dataclass(slots=True)
class Hint:
    """An address, and what came of it. ``next_try`` is infinite while the address is being greeted.

    Where ``is_doubted`` is set, something says that the node is no longer there, and it has not answered since.
    """

    sources: set[str]
    next_try: float = math.inf
    num_failures: int = 0
    failure: Failure | None = None
    node: str = ""  # the node that answered there last
    told: frozenset[Address] = frozenset()  # the addresses that this node and the other one have told each other
    is_doubted: bool = False

    def hasten(self, then: float) -> None:
        """Make sure that the address is greeted by ``then``, unless it is being greeted."""
        if self.next_try < math.inf:
            self.next_try = min(self.next_try, then)


@dataclass(slots=True)
class Membership:
    """The members of the cluster as this node knows them.

    ``own`` are the addresses at which this node itself can be reached. Where ``is_local`` is set, it greets no address
    beyond its own machine, because its links are not encrypted.
    """

    node: str
    cluster: str
    fingerprint: str
    began: float
    own: frozenset[Address] = frozenset()
    is_local: bool = False
    peers: dict[str, Peer] = field(default_factory=dict)
    hints: dict[Address, Hint] = field(default_factory=dict)
    records: dict[str, RecordHeard] = field(default_factory=dict)
    _has_company: bool = False
    _joined_at: float = -math.inf

    def handle(self, event: MembershipEvent, now: float) -> list[MembershipAction]:
        match event:
            case RecordHeard():
                return self._hear(event, now)
            case RecordGone(name):
                return self._drop_record(name, now)
            case AddressLearned(address, source):
                return self._learn(address, source)
            case PeerAnswered(address, peer, _, host) if peer.node == self.node:
                return self._meet_namesake(address, host, now)
            case PeerAnswered(address, peer, known):
                return self._join(address, peer, known, now)
            case PeerFailed(address, failure):
                return self._fail(address, failure, now)
            case PeerDoubted(node):
                for hint in self.hints.values():
                    if hint.node == node:
                        hint.is_doubted = True
                        hint.hasten(now)
                return self._pass_time(now)
            case NetworksChanged(own):
                return self._change_networks(own, now)
            case TimePassed():
                return self._pass_time(now)

    def next_deadline(self) -> float | None:
        """When ``TimePassed`` is due."""
        times = [hint.next_try for hint in self.hints.values()]
        if not self._has_company:
            times.append(self.began + ALONE_S)
        deadline = min(times, default=math.inf)
        return None if deadline == math.inf else deadline

    def settles_at(self) -> float:
        """When all peers are known, if no other one joins before: never as long as there is none, or an address is
        greeted for the first time.
        """
        is_asking = any(
            hint.next_try == math.inf and not hint.node and not hint.failure for hint in self.hints.values()
        )
        return math.inf if is_asking or not self.peers else self._joined_at + QUIET_S

    @property
    def known(self) -> tuple[Address, ...]:
        """The addresses to tell others."""
        return tuple(sorted(peer.address for peer in self.peers.values()))[:MAX_TOLD]

    def is_ours(self, record: RecordHeard) -> bool:
        """Whether a record claims to be of this cluster. Only a greeting shows whether it is."""
        return (record.cluster, record.fingerprint) == (self.cluster, self.fingerprint)

    def check(self) -> None:
        """Assert that peers were greeted at their addresses, that none of these is our own, and that limits hold."""
        assert not self.own & self.hints.keys()
        assert len(self.hints) <= MAX_ADDRESSES and len(self.records) <= MAX_ADDRESSES
        for node, peer in self.peers.items():
            assert node == peer.node != self.node
            assert self.hints[peer.address].node == node
            assert self.hints[peer.address].failure is None

    def _hear(self, record: RecordHeard, now: float) -> list[MembershipAction]:
        before = self.records.get(record.name)
        if before is None and len(self.records) >= MAX_ADDRESSES:
            return []
        self.records[record.name] = record
        if not self.is_ours(record):
            return []
        actions: list[MembershipAction] = []
        for address in record.addresses:
            actions += self._learn(address, RECORD)
        if before is not None and before.addresses != record.addresses:
            self._compare(before, record, now)
        return actions

    def _compare(self, before: RecordHeard, record: RecordHeard, now: float) -> None:
        """Ask at the addresses of a record that has changed: the node is where it answers first."""
        for address in {*before.addresses, *record.addresses} & self.hints.keys():
            hint = self.hints[address]
            if address not in record.addresses and RECORD in hint.sources:
                hint.sources.discard(RECORD)
                hint.is_doubted = True
            hint.hasten(now)

    def _drop_record(self, name: str, now: float) -> list[MembershipAction]:
        record = self.records.pop(name, None)
        for address in record.addresses if record else ():
            hint = self.hints.get(address)
            if hint is None or RECORD not in hint.sources:
                continue
            hint.sources.discard(RECORD)
            hint.hasten(now + GOODBYE_S)  # anyone may say goodbye in its name
        return []

    def _learn(self, address: Address, source: str) -> list[MembershipAction]:
        if address in self.own or (self.is_local and not address.is_loopback):
            return []
        hint = self.hints.get(address)
        if hint is None:
            if len(self.hints) >= MAX_ADDRESSES and not self._forget_worst():
                return []
            self.hints[address] = Hint({source})
            return self._greet(address)
        hint.sources.add(source)
        # News of an address that has failed: its board may be back. TOLD is repeated often, and is no news.
        return self._greet(address) if hint.failure and source != TOLD and hint.next_try < math.inf else []

    def _forget_worst(self) -> bool:
        """Forget an address that has failed and that no user of this machine has named; False where there is none."""
        failed = [
            (hint.num_failures, address)
            for address, hint in self.hints.items()
            if hint.failure is not None and hint.next_try < math.inf and hint.sources <= {RECORD, TOLD, CALLED}
        ]
        if failed:
            del self.hints[max(failed)[1]]
        return bool(failed)

    def _greet(self, address: Address) -> list[MembershipAction]:
        hint = self.hints[address]
        hint.next_try, hint.told = math.inf, hint.told | set(self.known)
        return [GreetPeer(address)]

    def _join(self, address: Address, peer: Peer, known: tuple[Address, ...], now: float) -> list[MembershipAction]:
        hint = self.hints.get(address)
        if hint is None:
            return []
        actions: list[MembershipAction] = []
        if hint.node and hint.node != peer.node:
            actions += self._lose(address, f"{peer.node} answers at its address now")
        is_new_there = hint.node != peer.node
        hint.node, hint.failure, hint.num_failures, hint.is_doubted = peer.node, None, 0, False
        hint.told |= set(known)
        before = self.peers.get(peer.node)
        has_moved = before is not None and before.address != address and self.hints[before.address].is_doubted
        if before is None or before.address == address or has_moved:
            self.peers[peer.node] = peer
        elif is_new_there:  # is it still at the other address, too?
            self.hints[before.address].hasten(now)
        if before is not None and has_moved:
            actions += [ReportMoved(peer, before.address), RememberPeers(self.known)]
        if before is None:
            self._has_company, self._joined_at = True, now
            actions += [ReportJoined(peer), RememberPeers(self.known)]
            for other_peer in self.peers.values():
                if address not in self.hints[other_peer.address].told:
                    self.hints[other_peer.address].hasten(now + GOSSIP_S)
        has_news = set(self.known) - hint.told - {address}
        hint.next_try = now + (GOSSIP_S if has_news else REFRESH_S)
        for other in known[:MAX_TOLD]:
            actions += self._learn(other, TOLD)
        return actions

    def _meet_namesake(self, address: Address, host: str, now: float) -> list[MembershipAction]:
        """Another node of this node's name, or this node itself, of which somebody has told by its host's name."""
        hint = self.hints.get(address)
        if hint is None:
            return []
        if Address(host, address.port) in self.own:
            del self.hints[address]
            self.own |= {address}
            return []
        why = f"the node at {address} has this node's own name, {self.node}; give one of the two another --name"
        is_news = hint.failure is None or hint.failure.kind != SAME_NAME
        return ([ReportNamesake(why)] if is_news else []) + self._fail(address, Failure(SAME_NAME, why), now)

    def _fail(self, address: Address, failure: Failure, now: float) -> list[MembershipAction]:
        hint = self.hints.get(address)
        if hint is None:
            return []
        actions = self._lose(address, failure.text)
        pause = RETRY_S[min(hint.num_failures, len(RETRY_S) - 1)]
        hint.failure, hint.node, hint.next_try = failure, "", now + pause
        hint.num_failures += 1
        if hint.sources <= {TOLD, CALLED} and hint.num_failures >= TOLD_ATTEMPTS:
            del self.hints[address]
        return actions

    def _lose(self, address: Address, why: str) -> list[MembershipAction]:
        """The actions that follow when a node no longer answers at an address where it did."""
        node = self.hints[address].node
        peer = self.peers.get(node)
        if peer is None or peer.address != address:
            return []
        del self.peers[node]
        actions: list[MembershipAction] = [ReportLost(peer, why)]
        for other, hint in self.hints.items():  # it may have further addresses
            if other != address and hint.node == node and hint.next_try < math.inf:
                actions += self._greet(other)
        return actions

    def _change_networks(self, own: frozenset[Address], now: float) -> list[MembershipAction]:
        """Greet all addresses: peers may have become unreachable or reachable, and learn this way where we are now."""
        self.own = own
        actions: list[MembershipAction] = []
        for address in sorted(own & self.hints.keys()):
            peer = self.peers.get(self.hints.pop(address).node)
            if peer is not None and peer.address == address:
                del self.peers[peer.node]
                actions.append(ReportLost(peer, "this machine has its address now"))
        for hint in self.hints.values():
            hint.hasten(now)
        return actions + self._pass_time(now)

    def _pass_time(self, now: float) -> list[MembershipAction]:
        actions: list[MembershipAction] = []
        for address, hint in self.hints.items():
            if hint.next_try <= now:
                actions += self._greet(address)
        if not self._has_company and now >= self.began + ALONE_S:
            self._has_company = True
            actions.append(ReportAlone())
        return actions
