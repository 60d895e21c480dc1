"""What counts as a stage time, and how many of them the rounds of the published schedules take."""

import sys
from collections.abc import Sequence

import numpy as np
import pytest

from benchmarks import originals
from benchmarks.originals import ONE_PASS_A_SECOND, count, measure, prompts_of
from flowspec_edge.bench.compare import check_text
from flowspec_edge.bench.tape import Tape
from flowspec_edge.bench.virtual_clock import VirtualRing
from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core.events import DraftFinished, RunDraft
from flowspec_edge.core.speculation.generation import TargetLimits

VOCAB, NUM_TOKENS = 16, 24
TEXT = [number % 3 for number in range(4 + 2 * NUM_TOKENS)]
"""What is drafted wrongly is none of its tokens."""

library = pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the prompts are files of Python 3.11")


class SureDrafter:
    """Gives 0.9 to a token that is always the target's, or never, and the rest to wrong ones."""

    def __init__(self, *, is_right: bool) -> None:
        self._is_right = is_right

    def open(self, session: int, capacity: int) -> None: ...

    def close(self, session: int) -> None: ...

    def run(self, job: RunDraft) -> DraftFinished:
        positions = job.positions[max(len(job.hidden) - 1, 0) :] + 1
        tokens = np.tile(np.arange(3, 13), (len(positions), 1))
        if self._is_right:
            tokens[:, 0] = (positions + 1) % 3
        log_probs = np.log(np.array([0.9, *[0.1 / 9] * 9], np.float32))
        return DraftFinished(tokens, np.tile(log_probs, (len(positions), 1)))


def rates(schedules: Sequence[str], *, is_right: bool) -> dict[str, float]:
    logits = np.zeros((len(TEXT), VOCAB), np.float32)
    logits[np.arange(len(TEXT) - 1), TEXT[1:]] = 1
    tape = Tape(4, tuple(TEXT), np.zeros((len(TEXT), 4), np.float32), logits)
    limits = TargetLimits(max_context=128, vocab_size=VOCAB, eos_token_ids=frozenset())
    found = {}
    for schedule in schedules:
        options = GenerateOptions(max_new_tokens=len(TEXT) - 4, schedule=schedule)
        answer = VirtualRing(ONE_PASS_A_SECOND, tape, SureDrafter(is_right=is_right), limits).generate(options)
        check_text(answer.tokens, tape.continuation, schedule)
        tokens, seconds = count(answer.token_times_s, NUM_TOKENS)
        found[schedule] = tokens / seconds
    return found


def test_whole_verifications_count_until_there_are_more_than_enough_tokens() -> None:
    times_s = [1.0, 5.0, 5.0, 9.0, 9.0, 9.0, 13.0]
    assert count(times_s, 1) == (2, 4.0)
    assert count(times_s, 2) == (5, 8.0), "two are not more than two"
    assert count(times_s, 99) == (6, 12.0), "a text may be shorter"


def test_a_tree_that_is_wrong_costs_a_trip_and_chunked_a_whole_round() -> None:
    """Five chunks pass four stages in eight stage times. Where chunks are verified one by one, the first one tells."""
    assert rates(["autoregressive", "chunked", "pruned", "lockstep"], is_right=False) == pytest.approx(
        {"autoregressive": 1 / 4, "chunked": 1 / 8, "pruned": 1 / 4, "lockstep": 1 / 4}
    )


def test_a_tree_that_is_right_brings_its_seven_levels_and_a_bonus_token() -> None:
    """All of the text's rows are in the first chunk."""
    assert rates(["chunked", "pruned", "lockstep"], is_right=True) == pytest.approx(
        {"chunked": 8 / 8, "pruned": 8 / 4, "lockstep": 8 / 4}
    )


@library
def test_the_prompts_are_the_first_tokens_of_the_librarys_files() -> None:
    bundle = Bundle.load(DEMO_BUNDLE)
    prompts = prompts_of(bundle)
    assert len(prompts) == 15 and {len(prompt) for prompt in prompts} == {100}


@library
@pytest.mark.slow
def test_schedules_are_measured_on_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(originals, "NUM_WRITTEN", 17)
    bundle = Bundle.load(DEMO_BUNDLE)
    found = measure(bundle, prompts_of(bundle)[:1], ["autoregressive", "chunked"])
    assert found["autoregressive"] == 0.25 < found["chunked"]
