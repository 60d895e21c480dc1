"""Which server is asked next, and when."""

import math

from hypothesis import given
from hypothesis import strategies as st

from flowspec_edge.core.cluster.reconnection import (
    FIRST_S,
    MOST_S,
    AskServer,
    GiveUp,
    NothingCame,
    PieceCame,
    Reconnection,
    ReconnectionAction,
    ServerLost,
    ServerRefused,
)

LOST = ServerLost("gone")


def of(num_servers: int, *, within_s: float = 100.0, chance: float = 1.0, server: int = 0) -> Reconnection:
    return Reconnection(num_servers, within_s, lambda: chance, server)


def test_the_next_server_is_asked_at_once_and_the_first_again_after_a_while() -> None:
    decisions = of(3, server=1)
    assert decisions.handle(LOST, 10.0) == [AskServer(2, 10.0, 110.0)]
    assert decisions.handle(LOST, 11.0) == [AskServer(0, 11.0, 110.0)]
    assert decisions.handle(LOST, 12.0) == [AskServer(1, 12.0 + FIRST_S, 110.0)]
    assert decisions.handle(LOST, 13.0) == [AskServer(2, 13.0, 110.0)]


def test_one_server_is_asked_less_and_less_often() -> None:
    decisions, now, waits = of(1), 0.0, []
    for _ in range(7):
        (action,) = decisions.handle(LOST, now)
        assert isinstance(action, AskServer)
        waits.append(action.at - now)
        now = action.at
    assert waits == [0.25, 0.5, 1.0, 2.0, 4.0, 4.0, 4.0] and waits[-1] == MOST_S


def test_clients_do_not_all_come_back_in_one_moment() -> None:
    assert [of(1, chance=chance).handle(LOST, 0.0)[0] for chance in (0.0, 0.5)] == [
        AskServer(0, FIRST_S / 2, 100.0),
        AskServer(0, FIRST_S * 0.75, 100.0),
    ]


def test_a_busy_server_is_asked_when_it_said_and_others_before() -> None:
    decisions = of(2)
    assert decisions.handle(ServerLost("busy", 5.0), 0.0) == [AskServer(1, 0.0, 100.0)]
    assert decisions.handle(LOST, 1.0) == [AskServer(0, 5.0, 100.0)]


def test_a_server_that_refuses_is_not_asked_again() -> None:
    decisions = of(2)
    assert decisions.handle(ServerRefused("other bundle"), 0.0) == [AskServer(1, FIRST_S, 100.0)]
    for now in (1.0, 2.0):
        (action,) = decisions.handle(LOST, now)
        assert isinstance(action, AskServer) and action.server == 1
    assert decisions.handle(ServerRefused("wrong key"), 3.0) == [GiveUp({0: "other bundle", 1: "wrong key"})]


def test_a_text_that_stands_still_for_too_long_is_given_up() -> None:
    decisions = of(1, within_s=10.0)
    decisions.handle(LOST, 0.0)
    assert decisions.handle(ServerLost("still gone"), 9.9) == [GiveUp({0: "still gone"})]


def test_what_a_server_said_is_told_where_it_said_nothing_at_last() -> None:
    decisions = of(2, within_s=10.0)
    decisions.handle(ServerLost("nothing answers"), 0.0)
    decisions.handle(ServerLost("it is busy"), 1.0)
    decisions.handle(ServerLost("nothing answers"), 2.0)
    assert decisions.handle(NothingCame(), 10.1) == [GiveUp({0: "nothing answers", 1: "it is busy"})]
    decisions = of(1, within_s=10.0)
    decisions.handle(PieceCame(), 0.0)
    assert isinstance(decisions.handle(NothingCame(), 1.0)[0], AskServer)
    assert decisions.handle(NothingCame(), 11.1) == [GiveUp({0: "it wrote nothing in time"})]


def test_each_piece_begins_the_time_anew() -> None:
    decisions = of(1, within_s=10.0)
    decisions.handle(LOST, 0.0)
    assert decisions.handle(PieceCame(), 9.0) == []
    assert decisions.handle(LOST, 30.0) == [AskServer(0, 30.0 + FIRST_S, 40.0)]


EVENTS = st.one_of(
    st.just(PieceCame()),
    st.builds(ServerLost, st.just("gone"), st.floats(0, 20)),
    st.just(ServerRefused("no")),
    st.just(NothingCame()),
)


@given(st.integers(1, 4), st.lists(st.tuples(EVENTS, st.floats(0, 5)), max_size=40), st.floats(0, 1))
def test_a_text_ends_or_a_server_is_asked_in_time(
    num_servers: int, events: list[tuple[ServerLost, float]], chance: float
) -> None:
    decisions, now, stands_since = of(num_servers, within_s=30.0, chance=chance), 0.0, math.inf
    refused: set[int] = set()
    for event, passed_s in events:
        asked = decisions.server
        actions: list[ReconnectionAction] = decisions.handle(event, now)
        decisions.check()
        if isinstance(event, PieceCame):
            stands_since = math.inf
            assert actions == []
            continue
        stands_since = min(stands_since, now)
        refused |= {asked} if isinstance(event, ServerRefused) else set()
        (action,) = actions
        if isinstance(action, GiveUp):
            assert asked in action.reasons
            return
        assert action.server not in refused
        assert now <= action.at < action.until == stands_since + 30.0
        now = action.at + passed_s
