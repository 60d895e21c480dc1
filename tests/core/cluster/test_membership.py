"""Membership: hints are greeted, peers kept and losses noticed, and no stream of forged news breaks it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowspec_edge.core.cluster import membership as ms
from flowspec_edge.core.cluster.address import Address, parse_address
from flowspec_edge.core.cluster.membership import (
    AddressLearned,
    Failure,
    GreetPeer,
    Membership,
    Peer,
    PeerAnswered,
    PeerDoubted,
    PeerFailed,
    RecordGone,
    RecordHeard,
    RememberPeers,
    ReportAlone,
    ReportJoined,
    ReportLost,
    TimePassed,
)
from tests.narrowing import present

HALL, ATTIC, ATTIC_WIFI, OWN = (Address(host, 7361) for host in ("10.0.0.1", "10.0.0.2", "10.1.0.2", "10.0.0.9"))
GONE = Failure(ms.TIMED_OUT, "no answer")


@pytest.fixture
def members() -> Iterator[Membership]:
    membership = Membership("pi-own", "home", "abc", 0.0, frozenset({OWN}))
    yield membership
    membership.check()


def record(node: str, *addresses: Address, cluster: str = "home", fingerprint: str = "abc") -> RecordHeard:
    return RecordHeard(f"{node}.record", node, addresses, cluster, fingerprint, "0.1.0")


def peer(node: str, address: Address) -> Peer:
    return Peer(node, address, "0.1.0", 2**30)


def answered(node: str, address: Address, *known: Address) -> PeerAnswered:
    return PeerAnswered(address, peer(node, address), known)


def joined(members: Membership, node: str, address: Address, now: float = 0.0) -> None:
    members.handle(AddressLearned(address, ms.TYPED), now)
    members.handle(answered(node, address), now)


def test_nobody_else_is_expected_when_all_have_answered_of_whom_was_told(members: Membership) -> None:
    assert members.settles_at() == math.inf
    members.handle(AddressLearned(HALL, ms.TYPED), 1.0)
    assert members.settles_at() == math.inf, "it is being asked"
    members.handle(answered("pi-hall", HALL, ATTIC), 1.1)
    assert members.settles_at() == math.inf, "it has told of another one"
    members.handle(answered("pi-attic", ATTIC), 1.3)
    assert members.settles_at() == 1.3 + ms.QUIET_S
    assert GreetPeer(HALL) in members.handle(TimePassed(), 20.0)
    assert members.settles_at() == 1.3 + ms.QUIET_S, "who is known is only asked whether it is still there"
    members.handle(AddressLearned(ATTIC_WIFI, ms.REMEMBERED), 20.1)
    assert members.settles_at() == math.inf
    members.handle(PeerFailed(ATTIC_WIFI, GONE), 20.2)
    assert members.settles_at() == 1.3 + ms.QUIET_S
    members.handle(TimePassed(), 25.0)
    assert members.settles_at() == 1.3 + ms.QUIET_S, "who was silent before may be so again"


def test_a_record_is_greeted_and_who_answers_is_in(members: Membership) -> None:
    assert members.handle(record("hall", HALL), 0) == [GreetPeer(HALL)]
    assert members.handle(record("hall", HALL), 0) == []
    assert members.handle(answered("hall", HALL), 1) == [ReportJoined(peer("hall", HALL)), RememberPeers((HALL,))]
    assert list(members.peers) == ["hall"]
    assert members.handle(answered("hall", HALL), 2) == []


def test_a_peer_that_somebody_lost_is_greeted_at_once_wherever_it_was(members: Membership) -> None:
    joined(members, "hall", HALL)
    joined(members, "attic", ATTIC)
    members.handle(AddressLearned(ATTIC_WIFI, ms.TYPED), 0)
    members.handle(answered("attic", ATTIC_WIFI), 0)
    assert members.handle(PeerDoubted("attic"), 0.1) == [GreetPeer(ATTIC), GreetPeer(ATTIC_WIFI)]
    assert members.handle(PeerDoubted("attic"), 0.1) == [], "it is being greeted"
    assert members.handle(PeerDoubted("nobody"), 0.1) == []
    assert members.handle(PeerFailed(ATTIC, GONE), 2) == [ReportLost(peer("attic", ATTIC), "no answer")]


def test_what_a_peer_tells_is_greeted_but_never_ourselves(members: Membership) -> None:
    members.handle(AddressLearned(HALL, ms.TYPED), 0)
    actions = members.handle(answered("hall", HALL, OWN, HALL, ATTIC), 0)
    assert actions[2:] == [GreetPeer(ATTIC)]
    assert members.known == (HALL,)


def test_what_stays_on_its_machine_is_not_lured_from_it() -> None:
    """Without a key a node keeps to its machine, though multicast from the LAN reaches sockets on loopback too."""
    members = Membership("pi-own", "home", "", 0.0, is_local=True)
    local = Address("127.0.0.1", 7361)
    assert members.handle(record("hall", HALL, local, fingerprint=""), 0) == [GreetPeer(local)]
    members.handle(answered("hall", local, ATTIC), 1)
    assert list(members.hints) == [local]


@pytest.mark.parametrize("stranger", [{"cluster": "other"}, {"fingerprint": "def"}, {"fingerprint": ""}])
def test_records_of_others_are_kept_for_the_doctor_and_never_greeted(
    members: Membership, stranger: Mapping[str, str]
) -> None:
    assert members.handle(record("hall", HALL, **stranger), 0) == []
    assert not members.hints
    assert list(members.records) == ["hall.record"]


def test_a_peer_is_greeted_again_and_missed_when_it_fails(members: Membership) -> None:
    joined(members, "hall", HALL)
    assert members.next_deadline() == ms.REFRESH_S
    assert members.handle(TimePassed(), ms.REFRESH_S) == [GreetPeer(HALL)]
    assert members.next_deadline() is None
    assert members.handle(PeerFailed(HALL, GONE), 20) == [ReportLost(peer("hall", HALL), "no answer")]
    assert not members.peers
    assert members.next_deadline() == 20 + ms.RETRY_S[0]
    members.handle(TimePassed(), 21)
    assert members.handle(answered("hall", HALL), 22)[0] == ReportJoined(peer("hall", HALL))


def test_failures_wait_longer_each_time_and_news_ends_the_wait(members: Membership) -> None:
    members.handle(record("hall", HALL), 0)
    pauses = []
    for _ in range(len(ms.RETRY_S) + 2):
        members.handle(PeerFailed(HALL, GONE), 100)
        pauses.append(members.hints[HALL].next_try - 100)
        members.handle(TimePassed(), 1000)
    assert pauses == [*ms.RETRY_S, ms.RETRY_S[-1], ms.RETRY_S[-1]]
    members.handle(PeerFailed(HALL, GONE), 100)
    assert members.handle(AddressLearned(HALL, ms.TOLD), 101) == []
    assert members.handle(record("hall", HALL), 101) == [GreetPeer(HALL)]


def test_a_goodbye_is_asked_about_not_believed(members: Membership) -> None:
    members.handle(record("hall", HALL), 0)
    members.handle(answered("hall", HALL), 0)
    assert members.handle(RecordGone("hall.record"), 1) == []
    assert members.next_deadline() == 1 + ms.GOODBYE_S
    assert members.handle(TimePassed(), 4) == [GreetPeer(HALL)]
    assert members.handle(answered("hall", HALL), 5) == []
    assert list(members.peers) == ["hall"]
    assert members.handle(RecordGone("unknown"), 6) == []


def test_a_node_with_two_addresses_is_one_peer_and_outlives_the_first(members: Membership) -> None:
    members.handle(record("attic", ATTIC, ATTIC_WIFI), 0)
    members.handle(answered("attic", ATTIC), 0)
    assert members.handle(answered("attic", ATTIC_WIFI), 0) == []
    members.handle(TimePassed(), ms.REFRESH_S)
    members.handle(answered("attic", ATTIC_WIFI), 16)
    assert members.handle(PeerFailed(ATTIC, GONE), 20) == [
        ReportLost(peer("attic", ATTIC), "no answer"),
        GreetPeer(ATTIC_WIFI),
    ]
    assert members.handle(answered("attic", ATTIC_WIFI), 21)[0] == ReportJoined(peer("attic", ATTIC_WIFI))


def test_a_node_that_calls_from_an_address_where_it_was_lost_is_greeted_there(members: Membership) -> None:
    joined(members, "hall", HALL)
    members.handle(TimePassed(), ms.REFRESH_S)
    members.handle(PeerFailed(HALL, GONE), 20)
    assert members.handle(AddressLearned(HALL, ms.TOLD), 20.1) == [], "that peers repeat it is no news"
    assert members.handle(AddressLearned(HALL, ms.CALLED), 20.1) == [GreetPeer(HALL)]
    assert members.handle(AddressLearned(HALL, ms.CALLED), 20.1) == [], "it is being greeted"


def test_a_node_that_has_another_address_now_moves_as_soon_as_the_old_one_is_doubted(members: Membership) -> None:
    members.handle(record("attic", ATTIC), 0)
    members.handle(answered("attic", ATTIC), 0)
    assert members.handle(record("attic", ATTIC_WIFI), 5) == [GreetPeer(ATTIC_WIFI)]
    assert members.next_deadline() == 5, "its record no longer has the old address, so that is asked"
    assert members.handle(TimePassed(), 5) == [GreetPeer(ATTIC)]
    moved = [ms.ReportMoved(peer("attic", ATTIC_WIFI), ATTIC), RememberPeers((ATTIC_WIFI,))]
    assert members.handle(answered("attic", ATTIC_WIFI), 5.1) == moved
    assert members.handle(PeerFailed(ATTIC, GONE), 10) == [], "nobody is lost"
    assert [found.address for found in members.peers.values()] == [ATTIC_WIFI]


def test_a_node_that_called_from_its_new_address_before_its_record_came_moves_as_soon(members: Membership) -> None:
    members.handle(record("attic", ATTIC), 0)
    members.handle(answered("attic", ATTIC), 0)
    members.handle(AddressLearned(ATTIC_WIFI, ms.CALLED), 3)
    members.handle(answered("attic", ATTIC_WIFI), 3)
    assert members.handle(TimePassed(), 3) == [GreetPeer(ATTIC)]
    members.handle(record("attic", ATTIC_WIFI), 4)
    assert members.handle(TimePassed(), 4) == [GreetPeer(ATTIC_WIFI)]
    assert members.handle(answered("attic", ATTIC_WIFI), 4)[0] == ms.ReportMoved(peer("attic", ATTIC_WIFI), ATTIC)


def test_a_second_address_of_a_node_has_the_first_one_asked_and_replaces_it_if_that_fails(members: Membership) -> None:
    joined(members, "attic", ATTIC)
    assert members.handle(AddressLearned(ATTIC_WIFI, ms.CALLED), 3) == [GreetPeer(ATTIC_WIFI)]
    assert members.handle(answered("attic", ATTIC_WIFI), 3) == []
    assert members.handle(TimePassed(), 3) == [GreetPeer(ATTIC)]
    assert members.handle(answered("attic", ATTIC), 3) == [], "it has both"
    assert members.handle(PeerDoubted("attic"), 9) == [GreetPeer(ATTIC), GreetPeer(ATTIC_WIFI)]
    assert members.handle(answered("attic", ATTIC_WIFI), 9)[0] == ms.ReportMoved(peer("attic", ATTIC_WIFI), ATTIC)


def test_in_other_networks_everyone_is_greeted_and_nobody_at_our_own_address(members: Membership) -> None:
    joined(members, "hall", HALL)
    joined(members, "attic", ATTIC)
    members.handle(AddressLearned(ATTIC_WIFI, ms.TYPED), 1)
    members.handle(PeerFailed(ATTIC_WIFI, GONE), 2)
    assert members.handle(ms.NetworksChanged(frozenset({OWN, HALL})), 2.5) == [
        ReportLost(peer("hall", HALL), "this machine has its address now"),
        GreetPeer(ATTIC),
        GreetPeer(ATTIC_WIFI),
    ]
    assert HALL not in members.hints
    assert members.handle(AddressLearned(HALL, ms.TYPED), 3) == []


def test_a_board_that_starts_again_under_another_name_replaces_itself(members: Membership) -> None:
    joined(members, "hall-100", HALL)
    members.handle(TimePassed(), ms.REFRESH_S)
    assert members.handle(answered("hall-200", HALL), 20)[:2] == [
        ReportLost(peer("hall-100", HALL), "hall-200 answers at its address now"),
        ReportJoined(peer("hall-200", HALL)),
    ]
    assert list(members.peers) == ["hall-200"]


def test_a_namesake_is_no_peer_and_named(members: Membership) -> None:
    members.handle(AddressLearned(HALL, ms.TYPED), 0)
    (report,) = members.handle(answered("pi-own", HALL), 0)
    assert isinstance(report, ms.ReportNamesake)
    assert "own name, pi-own; give one of the two another --name" in report.text
    members.handle(TimePassed(), 10)
    assert members.handle(answered("pi-own", HALL), 10) == []
    assert present(members.hints[HALL].failure).kind == ms.SAME_NAME


def test_a_node_of_which_others_tell_by_the_name_of_its_host_knows_itself(members: Membership) -> None:
    by_name = Address("pi-own.local", OWN.port)
    assert members.handle(AddressLearned(by_name, ms.TOLD), 0) == [GreetPeer(by_name)]
    assert members.handle(PeerAnswered(by_name, peer("pi-own", by_name), (), OWN.host), 0) == []
    assert members.handle(AddressLearned(by_name, ms.TOLD), 1) == [], "it is not greeted again"
    assert by_name not in members.hints


def test_a_peer_is_told_of_a_later_one_soon_and_once(members: Membership) -> None:
    joined(members, "hall", HALL)
    joined(members, "attic", ATTIC, 1.0)
    assert members.next_deadline() == 1.0 + ms.GOSSIP_S
    assert members.handle(TimePassed(), 2) == [GreetPeer(HALL)]
    members.handle(answered("hall", HALL), 2)
    assert present(members.next_deadline()) > 10


def test_a_peer_that_already_knows_the_later_one_is_left_alone(members: Membership) -> None:
    members.handle(AddressLearned(HALL, ms.TYPED), 0)
    members.handle(answered("hall", HALL, ATTIC), 0)
    members.handle(answered("attic", ATTIC, HALL), 1)
    assert members.next_deadline() == ms.REFRESH_S


def test_being_alone_is_said_once(members: Membership) -> None:
    assert members.next_deadline() == ms.ALONE_S
    assert members.handle(TimePassed(), ms.ALONE_S) == [ReportAlone()]
    assert members.handle(TimePassed(), 10) == []
    assert members.next_deadline() is None


def test_in_company_nobody_is_told_to_be_alone(members: Membership) -> None:
    joined(members, "hall", HALL)
    assert members.handle(TimePassed(), ms.ALONE_S) == []


def test_a_told_address_that_never_answers_is_forgotten_a_typed_one_is_not(members: Membership) -> None:
    members.handle(AddressLearned(HALL, ms.TOLD), 0)
    members.handle(AddressLearned(ATTIC, ms.TYPED), 0)
    for now in range(ms.TOLD_ATTEMPTS):
        for address in (HALL, ATTIC):
            members.handle(PeerFailed(address, GONE), now * 100)
        members.handle(TimePassed(), now * 100 + 50)
    assert list(members.hints) == [ATTIC]
    assert members.handle(PeerFailed(HALL, GONE), 900) == []


def test_a_flood_of_news_is_bounded(members: Membership) -> None:
    for number in range(1000):
        members.handle(record(f"pi-{number}", Address("10.9.9.9", number + 1)), 0)
        members.handle(AddressLearned(Address("10.9.9.8", number + 1), ms.TOLD), 0)
    assert len(members.hints) == len(members.records) == ms.MAX_ADDRESSES


NAMES, PLACES = st.sampled_from(["hall", "attic", "pi-own"]), st.sampled_from([HALL, ATTIC, ATTIC_WIFI, OWN])
EVENTS = st.one_of(
    st.builds(record, NAMES, PLACES, PLACES),
    st.builds(lambda node: RecordGone(f"{node}.record"), NAMES),
    st.builds(AddressLearned, PLACES, st.sampled_from([ms.TYPED, ms.TOLD, ms.REMEMBERED, ms.CALLED])),
    st.builds(answered, NAMES, PLACES, PLACES),
    st.builds(PeerFailed, PLACES, st.just(GONE)),
    st.builds(PeerDoubted, NAMES),
    st.builds(ms.NetworksChanged, st.sets(PLACES).map(frozenset)),
    st.just(TimePassed()),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(EVENTS, st.floats(0, 60)), max_size=40))
def test_whatever_happens_each_address_has_one_greeting_at_a_time(happenings: Sequence[Any]) -> None:
    members = Membership("pi-own", "home", "abc", 0.0, frozenset({OWN}))
    now, under_way = 0.0, set()
    for event, pause in happenings:
        if isinstance(event, (PeerAnswered, PeerFailed)):
            if event.address not in under_way:
                continue  # nothing comes back that was not sent
            under_way.discard(event.address)
        now += pause
        actions = members.handle(event, now)
        under_way -= members.own  # what comes of such a greeting is nothing to anyone
        for action in actions:
            if isinstance(action, GreetPeer):
                assert action.address not in under_way
                under_way.add(action.address)
        members.check()
        assert {address for address, hint in members.hints.items() if hint.next_try == math.inf} == under_way


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.1", Address("10.0.0.1", 7)),
        ("pi.local:80", Address("pi.local", 80)),
        ("[fe80::1]:80", Address("fe80::1", 80)),
        ("fe80::1", Address("fe80::1", 7)),
        *((text, None) for text in ("", ":80", "pi:x", "pi:0", "pi:70000", "a b", "[::1", "http://pi:80", "[::1]80")),
    ],
)
def test_addresses_as_they_are_typed(text: str, address: Address | None) -> None:
    assert parse_address(text, 7) == address
    if address is not None:
        assert parse_address(str(address), 7) == address


def test_forged_addresses_cannot_keep_a_board_out(members: Membership) -> None:
    forged = [Address(f"10.9.{number // 250}.{number % 250}", 1) for number in range(ms.MAX_ADDRESSES)]
    members.handle(AddressLearned(ATTIC, ms.TYPED), 0)
    for address in forged:
        members.handle(record("forged", address), 0)
    assert len(members.hints) == ms.MAX_ADDRESSES
    assert members.handle(record("hall", HALL), 0) == [], "all of them are being greeted, so there is no telling"
    members.handle(PeerFailed(ATTIC, GONE), 5)
    for address in forged[:-1]:
        members.handle(PeerFailed(address, GONE), 5)
    assert members.handle(record("hall", HALL), 6) == [GreetPeer(HALL)]
    assert ATTIC in members.hints and len(members.hints) == ms.MAX_ADDRESSES
    members.check()
