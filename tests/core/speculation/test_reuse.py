"""A prompt that begins like an earlier text takes its rows over: the same text, from fewer rows."""

import dataclasses
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowspec_edge.config import GenerateOptions
from flowspec_edge.core import events as ev
from flowspec_edge.core.speculation import generation, kept_sessions, pipeline
from flowspec_edge.core.speculation.kept_sessions import KEEP_S
from tests.core.speculation.test_ring import OPTIONS, PROMPTS
from tests.fakes import Answer, FakeRing, unsplit

AMPLE = 100_000
PROMPT = tuple(1 + place * place % 12 for place in range(150))
OPTION = GenerateOptions(max_new_tokens=40)


def ring_that_keeps(seed: int, num_stages: int = 3, taps: tuple[int, ...] = ()) -> FakeRing:
    return FakeRing(num_stages, random.Random(seed), taps=taps, max_kept_slots=AMPLE)


def write(ring: FakeRing, session: int, prompt: tuple[int, ...], options: GenerateOptions) -> Answer:
    """A text to its end. Time does not pass until what is kept is freed, as it does when a ring comes to rest."""
    answer = ring.submit(session, prompt, options)
    while answer.reason is None:
        assert ring.step(), "it stands still"
    return answer


def num_prompt_rows(ring: FakeRing, session: int, prompt: Sequence[int]) -> int:
    """Rows of the prompt that entered the ring."""
    return sum(id < len(prompt) for id in ring.sent[session])


SHORT = OPTIONS.map(lambda options: dataclasses.replace(options, max_new_tokens=1 + options.max_new_tokens % 16))
TURNS = st.lists(st.tuples(SHORT, PROMPTS, st.floats(0, 1), st.booleans()), min_size=2, max_size=4)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), TURNS, st.sampled_from([(), (2, 4, 5)]), st.integers(1, 300), st.integers(0, 2**32))
def test_each_turn_is_the_unsplit_models_text(
    num_stages: int,
    turns: Sequence[tuple[GenerateOptions, tuple[int, ...], float, bool]],
    taps: tuple[int, ...],
    num_pairs: int,
    seed: int,
) -> None:
    """Each goes on from some part of the text before, whatever its schedule was, and some are cancelled on the way.

    The fakes check each slot and each pair.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_sessions, "MIN_ROWS", 2)
        patch.setattr(generation, "PROMPT_PAIRS", num_pairs)
        patch.setattr(pipeline, "PREFILL_ROWS", 16)
        ring, history = ring_that_keeps(seed, num_stages, taps), tuple[int, ...]()
        rng = random.Random(seed)
        for session, (options, said, share, is_cancelled) in enumerate(turns, 1):
            prompt = (*history[: round(share * len(history))], *said)
            answer, expected = ring.submit(session, prompt, options), unsplit(prompt, options)
            for _ in range(rng.randrange(2000) if is_cancelled else 0):
                ring.step()
            if is_cancelled:
                ring.tell_origin(ev.GenerationCancelled(session))
            while not is_cancelled and answer.reason is None:
                assert ring.step(), "it stands still"
            assert answer.tokens == expected[: len(answer.tokens)]
            assert is_cancelled or answer.tokens == expected
            history = (*prompt, *answer.tokens)
        ring.run()


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(SHORT, st.integers(0, 150)), min_size=3, max_size=6), st.integers(0, 2**32))
def test_sessions_side_by_side_take_over_what_there_is(asked: Sequence[tuple[GenerateOptions, int]], seed: int) -> None:
    rng = random.Random(seed)
    ring = FakeRing(3, rng, max_kept_slots=1000)
    answers = {}
    for session, (options, num) in enumerate(asked, 1):
        prompt = (*PROMPT[:num], session)
        answers[session] = ring.submit(session, prompt, options), unsplit(prompt, options)
        for _ in range(rng.randrange(3000)):
            ring.step()
    while any(answer.reason is None for answer, _ in answers.values()):
        ring.step()
    assert all(answer.tokens == expected for answer, expected in answers.values())
    ring.run()
    assert not any(stage.caches for stage in ring.stages) and not ring.engine.drafter.kept


@pytest.mark.parametrize("schedule", ["flowspec", "autoregressive", "lockstep"])
def test_the_next_turn_computes_little_but_what_is_new(schedule: str) -> None:
    ring, options = ring_that_keeps(1), dataclasses.replace(OPTION, schedule=schedule)
    first = write(ring, 1, PROMPT, options)
    assert num_prompt_rows(ring, 1, PROMPT) == len(PROMPT)
    second = (*PROMPT, *first.tokens, 3, 4, 5)
    answer = ring.submit(2, second, options)
    num_kept = ring.origin.statistics(2).num_rows_kept
    ring.run()
    assert answer.tokens == unsplit(second, options)
    assert num_kept + num_prompt_rows(ring, 2, second) == len(second)
    assert num_prompt_rows(ring, 2, second) <= 3 + 2, "those that are new, the last token, and one for the drafter"


def test_a_stage_without_the_rows_says_so_and_the_text_begins_anew() -> None:
    ring = ring_that_keeps(1)
    first = write(ring, 1, PROMPT, OPTION)
    while ring.stages[1].caches.pop(1, None) is None:
        ring.step()
    second = (*PROMPT, *first.tokens, 3)
    answer = ring.submit(2, second, OPTION)
    statistics = ring.origin.statistics(2)
    assert statistics.num_rows_kept > len(PROMPT)
    ring.run()
    assert (answer.tokens, answer.reason, statistics.num_rows_kept) == ([], "cancelled", 0)
    assert not any(stage.caches for stage in ring.stages) and not ring.engine.drafter.kept
    assert write(ring, 3, second, OPTION).tokens == unsplit(second, OPTION)


def test_what_is_kept_is_freed_after_a_while() -> None:
    ring = ring_that_keeps(1)
    write(ring, 1, PROMPT, OPTION)
    assert ring.origin.kept == (1, 384)
    ended_at = ring.order.now_s
    assert ring.origin.next_deadline() == pytest.approx(ended_at + KEEP_S)
    ring.run()
    assert ring.order.now_s >= ended_at + KEEP_S
    assert ring.origin.kept == (0, 0) and not ring.engine.drafter.kept
    assert not any(stage.caches for stage in ring.stages)


def test_a_lost_ring_keeps_nothing() -> None:
    ring = ring_that_keeps(1)
    write(ring, 1, PROMPT, OPTION)
    ring.submit(2, PROMPT[1:], OPTION)
    ring.tell_origin(ev.RingLost("peer pi-hall: link lost"))
    assert ring.origin.kept == (0, 0)
    assert ring.answers[2].reason == "failed"
