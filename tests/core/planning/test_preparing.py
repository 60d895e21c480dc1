"""When layers are prepared to stand by: never while a text is written, and one block after the other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowspec_edge.core.planning import preparing as pr
from flowspec_edge.core.planning.preparing import (
    AGAIN_S,
    QUIET_S,
    Layers,
    LayersGone,
    LayersPrepared,
    LayersRefused,
    NodeGone,
    PlanStandbys,
    PrepareLayers,
    Preparing,
    ReleaseNode,
    RingClosed,
    RingOpened,
    StandbysPlanned,
    StopWork,
    TextBegan,
    TextEnded,
    TimePassed,
)

A, B, C = Layers("attic", 2, 3), Layers("attic", 3, 4), Layers("cellar", 3, 4)


@pytest.fixture
def core() -> Preparing:
    """A ring has been open for a while, and A is to be prepared, then B and C."""
    core = Preparing()
    assert core.handle(RingOpened(), 0.0) == []
    assert core.next_deadline() == QUIET_S
    assert core.handle(TimePassed(), QUIET_S) == [PlanStandbys()]
    assert core.next_deadline() is None
    assert core.handle(StandbysPlanned((A, B, C)), 5.0) == [PrepareLayers(A)]
    return core


def test_blocks_are_prepared_one_after_the_other(core: Preparing) -> None:
    assert core.handle(LayersPrepared(A), 6.0) == [PrepareLayers(B)]
    assert core.handle(LayersPrepared(B), 7.0) == [PrepareLayers(C)]
    assert core.handle(LayersPrepared(C), 8.0) == []
    assert core.holds(A) and core.holds(B) and core.holds(C)
    assert core.next_deadline() is None


def test_a_text_stops_it_at_once_and_it_goes_on_after_the_last_text(core: Preparing) -> None:
    assert core.handle(TextBegan(), 6.0) == [StopWork()]
    assert core.handle(TextBegan(), 6.1) == []
    assert core.handle(LayersRefused(A), 6.2) == [], "given up, which is no refusal"
    assert core.handle(TextEnded(), 7.0) == [] and core.next_deadline() is None
    assert core.handle(TextEnded(), 8.0) == [] and core.next_deadline() == 8.0 + QUIET_S
    assert core.handle(TimePassed(), 8.0 + QUIET_S) == [PrepareLayers(A)]


def test_what_was_being_loaded_when_a_text_began_stands_by(core: Preparing) -> None:
    assert core.handle(TextBegan(), 6.0) == [StopWork()]
    assert core.handle(LayersPrepared(A), 6.5) == [] and core.holds(A)
    core.handle(TextEnded(), 7.0)
    assert core.handle(TimePassed(), 7.0 + QUIET_S) == [PrepareLayers(B)]


def test_what_is_refused_is_asked_for_again_later_and_the_rest_now(core: Preparing) -> None:
    assert core.handle(LayersRefused(A), 6.0) == [PrepareLayers(B)]
    core.handle(LayersPrepared(B), 7.0)
    assert core.handle(LayersPrepared(C), 8.0) == []
    assert core.next_deadline() == 6.0 + AGAIN_S
    assert core.handle(TimePassed(), 6.0 + AGAIN_S) == [PrepareLayers(A)]


def test_what_was_given_back_and_what_a_lost_node_had_is_asked_for_again(core: Preparing) -> None:
    core.handle(LayersPrepared(A), 6.0)
    assert core.handle(LayersGone(A), 6.5) == [] and not core.holds(A)
    assert core.handle(NodeGone("attic"), 7.0) == [PrepareLayers(C)], "B is not to be answered any more"
    assert core.handle(LayersPrepared(C), 8.0) == []
    assert core.next_deadline() == 7.0 + AGAIN_S
    assert core.handle(TimePassed(), 7.0 + AGAIN_S) == [PrepareLayers(A)]


def test_a_plan_that_failed_is_made_again_later() -> None:
    core = Preparing()
    core.handle(RingOpened(), 0.0)
    core.handle(TimePassed(), QUIET_S)
    assert core.handle(StandbysPlanned(None), 4.0) == []
    assert core.next_deadline() == 4.0 + AGAIN_S


def test_a_new_ring_is_planned_for_anew_and_lets_go_of_nodes_that_hold_what_it_does_not_want(core: Preparing) -> None:
    core.handle(LayersPrepared(A), 6.0)
    core.handle(LayersPrepared(B), 7.0)
    core.handle(LayersPrepared(C), 8.0)
    core.handle(RingClosed(), 9.0)
    assert core.holds(A) and core.next_deadline() is None, "the next ring may take it over"
    core.handle(RingOpened(), 9.5)
    assert core.handle(TimePassed(), 9.5 + QUIET_S) == [PlanStandbys()]
    assert core.handle(StandbysPlanned((B, C)), 13.0) == [ReleaseNode("attic"), PrepareLayers(B)]
    assert not core.holds(A) and core.holds(C)


def test_a_plan_for_an_earlier_ring_is_not_taken() -> None:
    core = Preparing()
    core.handle(RingOpened(), 0.0)
    assert core.handle(TimePassed(), QUIET_S) == [PlanStandbys()]
    assert core.handle(RingOpened(), 4.0) == [StopWork()]
    assert core.handle(StandbysPlanned((A,)), 4.1) == []
    assert core.handle(TimePassed(), 4.0 + QUIET_S) == [PlanStandbys()]


LAYERS = st.sampled_from([A, B, C])
EVENTS = st.one_of(
    st.sampled_from([RingOpened(), RingClosed(), TextBegan(), TextEnded(), TimePassed(), NodeGone("attic")]),
    LAYERS.map(LayersGone),
    st.booleans(),  # an answer to what was asked for: yes or no
    st.lists(LAYERS, unique=True).map(lambda wanted: StandbysPlanned(tuple(wanted))),
)


def answer_to(work: PlanStandbys | PrepareLayers | None, is_yes: bool) -> pr.PreparingEvent | None:
    if not isinstance(work, PrepareLayers):
        return None
    return LayersPrepared(work.layers) if is_yes else LayersRefused(work.layers)


@given(st.lists(st.tuples(EVENTS, st.floats(0.0, 30.0))))
def test_while_a_text_is_written_nothing_is_begun_and_nothing_goes_on_unasked(
    steps: list[tuple[pr.PreparingEvent | bool, float]],
) -> None:
    core, now, num_texts, is_open = Preparing(), 0.0, 0, False
    work: PlanStandbys | PrepareLayers | None = None
    is_stopped = False
    for step, pause_s in steps:
        now += pause_s
        event = answer_to(work, step) if isinstance(step, bool) else step
        if event is None or (isinstance(event, StandbysPlanned) and not isinstance(work, PlanStandbys)):
            continue  # nobody asked
        if isinstance(event, TextEnded) and not num_texts:
            continue
        match event:
            case TextBegan():
                num_texts += 1
            case TextEnded():
                num_texts -= 1
            case RingOpened():
                is_open = True
            case RingClosed():
                is_open = False
            case StandbysPlanned() | LayersPrepared() | LayersRefused():
                work, is_stopped = None, False
            case NodeGone(node) if isinstance(work, PrepareLayers) and work.layers.node == node:
                work, is_stopped = None, False
        for action in core.handle(event, now):
            match action:
                case PlanStandbys() | PrepareLayers():
                    assert work is None and is_open and not num_texts
                    work = action
                case StopWork():
                    assert work is not None and not is_stopped
                    is_stopped = True
        assert work is None or is_stopped or (is_open and not num_texts)
        core.check()
        if core.next_deadline() is None:
            assert work is not None or num_texts or not is_open or not core._missing()
