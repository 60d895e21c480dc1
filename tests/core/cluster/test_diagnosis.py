"""Each way in which a node can be heard of and not used has one reason and a command."""

from typing import Any

import pytest

from flowspec_edge.core.cluster import diagnosis as dg
from flowspec_edge.core.cluster import membership as ms
from flowspec_edge.core.cluster.address import Address
from flowspec_edge.core.cluster.diagnosis import REACHED, UNRESOLVED, Surroundings, diagnose
from flowspec_edge.core.cluster.membership import (
    AddressLearned,
    Failure,
    Membership,
    Peer,
    PeerAnswered,
    PeerFailed,
    RecordHeard,
)

HALL, HALL_WIFI, ATTIC = Address("10.0.0.1", 7361), Address("10.1.0.1", 7361), Address("10.0.0.2", 7361)
MIB = 2**20


@pytest.fixture
def members() -> Membership:
    return Membership("doctor", "home", "abc", 0.0)


def around(neighbours: dict[str, str] | None = None, **changes: Any) -> Surroundings:
    return Surroundings(neighbours or {}, frozenset({"10.0.0.1", "10.0.0.2"}), **changes)


def hear(
    members: Membership, *addresses: Address, cluster: str = "home", fingerprint: str = "abc", node: str = "hall"
) -> None:
    members.handle(RecordHeard(f"{node}.record", node, addresses or (HALL,), cluster, fingerprint, "0.1.0"), 0)


def fail(members: Membership, address: Address, kind: str, source: str = ms.TYPED) -> None:
    members.handle(AddressLearned(address, source), 0)
    members.handle(PeerFailed(address, Failure(kind, f"said so: {kind}")), 1)


def answer(members: Membership, address: Address = HALL, node: str = "hall", free: int = 100 * MIB) -> None:
    members.handle(AddressLearned(address, ms.TYPED), 0)
    members.handle(PeerAnswered(address, Peer(node, address, "0.1.0", free)), 1)


def test_a_peer_that_is_heard_and_answers_is_ready(members: Membership) -> None:
    hear(members)
    answer(members)
    (finding,) = diagnose(members, around())
    assert (finding.node, finding.address, finding.reason, finding.remedy) == ("hall", str(HALL), dg.READY, "")
    assert finding.heard_by == ("--peer", "mDNS")


def test_a_peer_that_answers_and_is_not_heard_shows_that_multicast_is_blocked(members: Membership) -> None:
    answer(members)
    (finding,) = diagnose(members, around())
    assert finding.reason == dg.MULTICAST
    assert finding.is_usable
    assert "sudo ufw allow 5353/udp" in finding.remedy and "--peer 10.0.0.1:7361" in finding.remedy
    assert diagnose(members, around(hears_mdns=False))[0].reason == dg.READY


def test_too_little_memory(members: Membership) -> None:
    hear(members)
    answer(members, free=10 * MIB)
    (finding,) = diagnose(members, around(needed_bytes=20 * MIB))
    assert finding.reason == dg.LITTLE_MEMORY
    assert not finding.is_usable
    assert "offers 10 MiB" in finding.detail and "needs 20 MiB" in finding.detail


@pytest.mark.parametrize(
    ("ours", "theirs", "detail", "remedy"),
    [
        ("abc", "def", "it has key def, this machine has key abc", "flowspec key show here; then on hall"),
        ("abc", "", "it has no key", "flowspec key show here; then on hall: flowspec key set KEY"),
        ("", "def", "this machine has no key", "flowspec key show on hall; then here: flowspec key set KEY"),
    ],
)
def test_another_key(ours: str, theirs: str, detail: str, remedy: str) -> None:
    members = Membership("doctor", "home", ours, 0.0)
    hear(members, fingerprint=theirs)
    (finding,) = diagnose(members, around())
    assert finding.reason == ms.OTHER_KEY
    assert detail in finding.detail and remedy in finding.remedy


def test_another_label(members: Membership) -> None:
    hear(members, cluster="garage")
    (finding,) = diagnose(members, around())
    assert (finding.reason, "--cluster garage here" in finding.remedy) == (dg.OTHER_CLUSTER, True)


UP, DOWN = {"10.0.0.1": REACHED}, {"10.0.0.1": UNRESOLVED}


@pytest.mark.parametrize(
    ("is_heard", "kind", "neighbours", "reason", "remedy"),
    [
        (True, ms.OTHER_KEY, UP, ms.OTHER_KEY, "flowspec key set"),  # a rogue that announces our fingerprint
        (False, ms.OTHER_KEY, UP, ms.OTHER_KEY, "on the board at 10.0.0.1: flowspec key set"),
        (True, ms.OTHER_VERSION, UP, ms.OTHER_VERSION, "pip install --upgrade flowspec-edge here and on hall"),
        (False, ms.SAME_NAME, UP, ms.SAME_NAME, "--name OTHER-NAME"),
        (True, ms.REFUSED, UP, dg.STALE, "flowspec node on hall"),
        (False, ms.REFUSED, UP, dg.UNREACHABLE, "flowspec node on the board at 10.0.0.1"),
        (True, ms.TIMED_OUT, UP, dg.FIREWALL, "sudo ufw allow 7361/tcp on hall"),
        (False, ms.TIMED_OUT, UP, dg.FIREWALL, "sudo ufw allow 7361/tcp"),
        (True, ms.NO_ROUTE, DOWN, dg.ISOLATED, "client (AP) isolation"),
        (True, ms.TIMED_OUT, {}, dg.ISOLATED, "client (AP) isolation"),
        (False, ms.NO_ROUTE, DOWN, dg.UNREACHABLE, "hostname -I"),
        (False, ms.NO_NAME, {}, dg.UNREACHABLE, "--peer 192.168.1.20"),
        (False, ms.BROKEN, UP, ms.BROKEN, "flowspec --verbose node"),
    ],
)
def test_an_address_that_failed(
    members: Membership, is_heard: bool, kind: str, neighbours: dict[str, str], reason: str, remedy: str
) -> None:
    if is_heard:
        hear(members)
    fail(members, HALL, kind, ms.RECORD if is_heard else ms.TYPED)
    (finding,) = diagnose(members, around(neighbours))
    assert finding.reason == reason
    assert remedy in finding.remedy
    assert not finding.is_usable


def test_an_address_in_another_network(members: Membership) -> None:
    fail(members, HALL_WIFI, ms.TIMED_OUT)
    (finding,) = diagnose(members, around())
    assert (finding.reason, "10.1.0.1 lies in a network" in finding.detail) == (dg.UNREACHABLE, True)


def test_several_known_boards_that_are_all_silent_suggest_isolation(members: Membership) -> None:
    for address in (HALL, ATTIC):
        fail(members, address, ms.NO_ROUTE, ms.REMEMBERED)
    findings = diagnose(members, around({"10.0.0.1": UNRESOLVED, "10.0.0.2": UNRESOLVED}))
    assert [finding.reason for finding in findings] == [dg.ISOLATED, dg.ISOLATED]


def test_of_several_addresses_the_one_that_says_most_counts_and_one_that_works_is_enough(members: Membership) -> None:
    hear(members, HALL, HALL_WIFI)
    fail(members, HALL_WIFI, ms.TIMED_OUT, ms.RECORD)
    fail(members, HALL, ms.REFUSED, ms.RECORD)
    (finding,) = diagnose(members, around(UP))
    assert (finding.address, finding.reason) == (str(HALL), dg.STALE)
    answer(members)
    (finding,) = diagnose(members, around(UP))
    assert finding.reason == dg.READY


def test_a_record_at_whose_address_another_node_answers_is_stale(members: Membership) -> None:
    hear(members, node="hall-100")
    hear(members, node="hall-200")
    answer(members, node="hall-200")
    ready, stale = diagnose(members, around())
    assert (ready.node, ready.reason) == ("hall-200", dg.READY)
    assert (stale.node, stale.reason) == ("hall-100", dg.STALE)
    assert "hall-200 answers" in stale.detail


def test_our_own_record_is_no_finding() -> None:
    members = Membership("doctor", "home", "abc", 0.0, frozenset({HALL}))
    hear(members, node="doctor")
    assert diagnose(members, around()) == []
