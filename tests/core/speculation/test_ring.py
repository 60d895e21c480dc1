"""The whole method on the real cores: whatever the timing, the text is what the unsplit model would have written."""

import dataclasses
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowspec_edge.config import GenerateOptions
from flowspec_edge.core import events as ev
from flowspec_edge.core.speculation import generation, kv_slots, pipeline
from flowspec_edge.core.speculation.origin import PROGRESS_TIMEOUT_S
from flowspec_edge.core.speculation.schedules import SCHEDULES, ablation_names
from flowspec_edge.errors import ProtocolError, RequestError
from tests import fakes
from tests.fakes import FakeRing, logits_of, path_hash, unsplit
from tests.narrowing import present

OPTIONS = st.builds(
    GenerateOptions,
    max_new_tokens=st.integers(1, 60),
    temperature=st.sampled_from([0.0, 0.6, 1.0]),
    top_k=st.sampled_from([0, 3]),
    top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.8, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, -0.5, 0.5]),
    logit_bias=st.sampled_from([(), (), ((3, 1.5), (0, -100.0))]),
    stop_token_ids=st.sampled_from([(), (), (5, 7)]),
    ignore_eos=st.sampled_from([False, False, False, True]),
    min_tokens=st.sampled_from([0, 0, 20]),
    num_logprobs=st.sampled_from([None, 0, 2]),
    seed=st.integers(0, 2**64 - 1),
    schedule=st.sampled_from([*SCHEDULES, *ablation_names()]),
)
PROMPTS = st.lists(st.integers(1, 12), min_size=1, max_size=200).map(tuple)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 6), PROMPTS, OPTIONS, st.floats(0, 1), st.integers(0, 2**32))
def test_output_equals_the_unsplit_models(
    num_stages: int, prompt: tuple[int, ...], options: GenerateOptions, skill: float, seed: int
) -> None:
    ring = FakeRing(num_stages, random.Random(seed), skill)
    answer = ring.submit(1, prompt, options)
    ring.run()
    assert answer.tokens == unsplit(prompt, options)
    assert answer.reason in ("stop", "length")
    assert not any(stage.caches for stage in ring.stages)


@settings(max_examples=50, deadline=None)
@given(PROMPTS, OPTIONS, st.integers(0, 60), st.integers(0, 2**32))
def test_another_ring_goes_on_as_the_first_one_would_have(
    prompt: tuple[int, ...], options: GenerateOptions, num_written: int, seed: int
) -> None:
    """Penalties and the least length know what of its prompt was written."""
    expected = unsplit(prompt, options)
    num_written = min(num_written, len(expected) - 1)
    ring = FakeRing(2, random.Random(seed))
    left = dataclasses.replace(options, max_new_tokens=options.max_new_tokens - num_written)
    answer = ring.submit(1, (*prompt, *expected[:num_written]), left, num_written)
    ring.run()
    assert answer.tokens == expected[num_written:]


@settings(max_examples=30, deadline=None)
@given(PROMPTS, OPTIONS, st.integers(0, 4), st.integers(0, 2**32))
def test_each_token_comes_with_its_logprobs(
    prompt: tuple[int, ...], options: GenerateOptions, num_top: int, seed: int
) -> None:
    """By the target's own distribution, whatever the options make of it."""
    ring = FakeRing(3, random.Random(seed))
    answer = ring.submit(1, prompt, dataclasses.replace(options, num_logprobs=num_top))
    ring.run()
    for at, (token, told) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
        logits = logits_of(path_hash([*prompt, *answer.tokens[:at]])).astype(np.float64)
        log_probs = logits - np.log(np.exp(logits).sum())
        best = np.argsort(-log_probs)[:num_top].tolist()
        assert [one.token for one in (told.drawn, *told.top)] == [token, *best]
        np.testing.assert_allclose([one.logprob for one in (told.drawn, *told.top)], log_probs[[token, *best]])


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), PROMPTS, OPTIONS, st.integers(2, 6), st.integers(0, 2**32))
def test_drafts_reach_no_deeper_than_attention_finds_them(
    num_stages: int, prompt: tuple[int, ...], options: GenerateOptions, num_recent: int, seed: int
) -> None:
    """Chunks overtake the Advances that commit what is too old to be anywhere: then it is moved to its place."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (kv_slots, generation, fakes):
            patch.setattr(module, "RECENT_ROWS", num_recent)
        ring = FakeRing(num_stages, random.Random(seed), skill=0.9)
        answer = ring.submit(1, prompt, options)
        ring.run()
        assert answer.tokens == unsplit(prompt, options)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), PROMPTS, OPTIONS, st.floats(0, 1), st.integers(0, 2**32))
def test_tapped_rows_reach_the_drafter_from_whichever_stages_own_them(
    num_stages: int, prompt: tuple[int, ...], options: GenerateOptions, skill: float, seed: int
) -> None:
    """The fake drafter checks each tapped row by its path. Rows come in any order, from one stage or from three."""
    ring = FakeRing(num_stages, random.Random(seed), skill, taps=(2, 4, 5))
    answer = ring.submit(1, prompt, options)
    ring.run()
    assert answer.tokens == unsplit(prompt, options)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), PROMPTS, OPTIONS, st.booleans(), st.integers(1, 50), st.integers(0, 2**32))
def test_the_drafter_takes_a_long_prompt_in_parts(
    num_stages: int, prompt: tuple[int, ...], options: GenerateOptions, is_tapped: bool, num_pairs: int, seed: int
) -> None:
    """The fake drafter checks that it is given each pair once, in the order of the text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "PROMPT_PAIRS", num_pairs)
        patch.setattr(pipeline, "PREFILL_ROWS", 16)
        ring = FakeRing(num_stages, random.Random(seed), taps=(2, 4) if is_tapped else ())
        answer = ring.submit(1, prompt, options)
        ring.run()
    assert answer.tokens == unsplit(prompt, options)


def test_drafts_from_tapped_rows_speed_up_as_much_as_others() -> None:
    for taps in ((), (2, 4, 5)):
        ring = FakeRing(3, random.Random(1), skill=1.0, taps=taps)
        answer = ring.submit(1, (1, 2, 3), GenerateOptions(max_new_tokens=60))
        ring.run()
        assert len(answer.trips) < len(answer.tokens)


def test_rows_that_nobody_asked_for_are_refused() -> None:
    ring = FakeRing(2, random.Random(1), taps=(2, 4))
    ring.submit(1, (1, 2, 3), GenerateOptions())
    for stage in range(2):
        ring.tell_origin(ev.StageReady(1, stage))  # the prompt leaves
    row = np.zeros((1, 2), np.float32)
    for id, layer in ((0, 3), (9, 2)):
        with pytest.raises(ProtocolError, match=f"row {id} of layer {layer} came unasked"):
            ring.tell_origin(ev.TappedArrived(1, layer, (id,), row))
    ring.tell_origin(ev.TappedArrived(1, 2, (0,), row))
    with pytest.raises(ProtocolError, match="or twice"):
        ring.tell_origin(ev.TappedArrived(1, 2, (0,), row))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(PROMPTS, OPTIONS), min_size=2, max_size=6), st.integers(0, 2**32))
def test_sessions_share_the_ring_without_mixing(
    requests: Sequence[tuple[tuple[int, ...], GenerateOptions]], seed: int
) -> None:
    ring = FakeRing(3, random.Random(seed))
    answers = [ring.submit(session, *request) for session, request in enumerate(requests)]
    ring.run()
    assert [answer.tokens for answer in answers] == [unsplit(*request) for request in requests]


def test_several_stages_work_on_one_text_at_once() -> None:
    ring = FakeRing(4, random.Random(1), skill=1.0)
    answer = ring.submit(1, (1, 2, 3), GenerateOptions(max_new_tokens=60))
    most_at_work = 0
    while ring.step():
        most_at_work = max(most_at_work, ring.num_at_work)
    assert most_at_work >= 3
    assert len(answer.trips) < len(answer.tokens)


def test_forwards_that_nobody_needs_are_cancelled_and_leave_no_trace() -> None:
    ring = FakeRing(4, random.Random(8), skill=0.5)
    options = GenerateOptions(max_new_tokens=60, temperature=1.0, seed=8)
    answer = ring.submit(1, (1, 2, 3), options)
    ring.run()
    assert sum(stage.num_cancelled for stage in ring.stages) > 5
    assert answer.tokens == unsplit((1, 2, 3), options)


def test_a_cancelled_generation_frees_every_cache_and_emits_nothing_more() -> None:
    ring = FakeRing(3, random.Random(2))
    answer = ring.submit(1, (1, 2, 3), GenerateOptions(max_new_tokens=60))
    while len(answer.tokens) < 3:
        ring.step()
    emitted = list(answer.tokens)
    ring.tell_origin(ev.GenerationCancelled(1))
    ring.run()
    assert (answer.tokens, answer.reason) == (emitted, "cancelled")
    assert not any(stage.caches for stage in ring.stages)


def test_a_lost_ring_ends_each_generation_with_the_reason() -> None:
    ring = FakeRing(3, random.Random(3))
    answers = [ring.submit(session, (1, 2), GenerateOptions()) for session in (1, 2)]
    ring.tell_origin(ev.RingLost("peer pi-hall: link lost"))
    assert [(answer.reason, answer.error) for answer in answers] == [("failed", "peer pi-hall: link lost")] * 2


def test_a_silent_ring_is_given_up_after_the_deadline() -> None:
    ring = FakeRing(2, random.Random(4))
    answer = ring.submit(1, (1, 2), GenerateOptions())
    assert ring.origin.next_deadline() == pytest.approx(ring.order.now_s + PROGRESS_TIMEOUT_S)
    ring.order.now_s += PROGRESS_TIMEOUT_S
    ring.tell_origin(ev.DeadlinePassed())
    assert answer.reason == "failed"
    assert "nothing came back" in present(answer.error)


def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers() -> None:
    ring = FakeRing(1, random.Random(5), max_context=8)
    with pytest.raises(RequestError, match="the prompt has 8 tokens, the model's context holds 8"):
        ring.submit(1, (1,) * 8, GenerateOptions())


def test_the_context_limit_ends_the_text() -> None:
    ring = FakeRing(2, random.Random(6), max_context=20)
    answer = ring.submit(1, (5, 6, 7), GenerateOptions(max_new_tokens=100))
    ring.run()
    assert answer.tokens == unsplit((5, 6, 7), GenerateOptions(max_new_tokens=100), max_context=20)


def test_an_unknown_schedule_is_refused_with_the_known_ones() -> None:
    ring = FakeRing(1, random.Random(7))
    with pytest.raises(RequestError, match=f"choose one of {', '.join(SCHEDULES)}$"):
        ring.submit(1, (1,), GenerateOptions(schedule="fastest"))
