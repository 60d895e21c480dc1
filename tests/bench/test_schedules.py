"""Laws of the schedules, on the virtual clock, which is exact."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from flowspec_edge.bench.compare import Bench, Task
from flowspec_edge.bench.known_testbeds import known_testbeds
from flowspec_edge.bench.prompts import load_prompts
from flowspec_edge.bench.tape import Tape
from flowspec_edge.bench.testbed import Testbed, load_testbed
from flowspec_edge.bench.virtual_clock import VirtualRing
from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core.events import DraftFinished, RunDraft
from flowspec_edge.core.speculation.drafting import DraftShape
from flowspec_edge.core.speculation.generation import TargetLimits
from flowspec_edge.core.speculation.schedules import SCHEDULES
from flowspec_edge.engine.drafters.drafter import Drafter
from flowspec_edge.engine.drafters.eagle1 import Eagle1Drafter
from flowspec_edge.engine.head import Head
from tests.bench.conftest import make_tape

NUM_TOKENS = 64


@pytest.fixture(scope="module")
def tapes(bench: Bench) -> list[Tape]:
    """Three texts of different kinds."""
    prompts = load_prompts()
    return [
        bench.record(
            Task(prompt_set=name, seed=0, temperature=0.6, text=prompts[name][0]),
            GenerateOptions(max_new_tokens=NUM_TOKENS, temperature=0.6),
        )
        for name in ("functions", "classes", "tables")
    ]


@pytest.fixture(scope="module")
def limits(bundle: Bundle) -> TargetLimits:
    return TargetLimits(
        bundle.manifest.geometry.max_context,
        bundle.manifest.geometry.vocab_size,
        frozenset(bundle.manifest.eos_token_ids),
    )


def tokens_per_s(
    testbed: str,
    schedule: str,
    tapes: Sequence[Tape],
    drafter_for: Callable[[Tape], Drafter],
    limits: TargetLimits,
) -> float:
    """Over all texts, each of which comes out as the target has it."""
    options = GenerateOptions(max_new_tokens=NUM_TOKENS, temperature=0.6, schedule=schedule)
    answers = [VirtualRing(load_testbed(testbed), tape, drafter_for(tape), limits).generate(options) for tape in tapes]
    assert [answer.tokens for answer in answers] == [list(tape.continuation) for tape in tapes]
    return sum(answer.num_decoded for answer in answers) / sum(answer.decode_s for answer in answers)


@pytest.fixture(scope="module")
def rates(bundle: Bundle, tapes: list[Tape], limits: TargetLimits) -> Callable[[str], dict[str, float]]:
    """Tokens/s of every schedule on a testbed."""
    head = Head(bundle.directory, bundle.manifest)
    drafter = Eagle1Drafter(bundle.directory, bundle.manifest, head, k=DraftShape().proposals)
    return lambda testbed: {
        schedule: tokens_per_s(testbed, schedule, tapes, lambda tape: drafter, limits)
        for schedule in [*SCHEDULES, "flowspec-without-coupling"]
    }


@pytest.mark.parametrize("testbed", ["jetson4-7b-fp16-1gbit", "jetson4-7b-int4-150mbit"])
def test_flowspec_leads_on_boards_where_rows_are_cheap(rates: Callable[[str], dict[str, float]], testbed: str) -> None:
    rate = rates(testbed)
    assert rate["flowspec"] > 1.6 * rate["chunked"]
    assert rate["flowspec"] > max(rate["lockstep"], rate["pipedec"], rate["pruned"])
    assert min(rate["lockstep"], rate["pruned"]) > rate["chunked"] > rate["autoregressive"]
    assert rate["flowspec"] > rate["flowspec-without-coupling"]


def test_flowspec_leads_where_every_row_costs_and_trees_do_not_pay(rates: Callable[[str], dict[str, float]]) -> None:
    rate = rates("pi5x4-3b-int4")
    assert rate["flowspec"] > 1.4 * rate["autoregressive"]
    assert rate["flowspec"] > 3.5 * rate["chunked"]
    assert rate["chunked"] < rate["autoregressive"], "the published method does not pay here"


class WrongDrafter:
    """Sure of tokens that never come."""

    def __init__(self, tape: Tape) -> None:
        words = sorted(set(range(len(tape.tokens) + DraftShape().children)) - set(tape.tokens))
        self._wrong = np.array(words[: DraftShape().children])

    def open(self, session: int, capacity: int) -> None:
        pass

    def close(self, session: int) -> None:
        pass

    def run(self, job: RunDraft) -> DraftFinished:
        num_rows = len(job.rows) - max(len(job.hidden) - 1, 0)
        log_probs = np.log(0.9 * 0.1 ** np.arange(len(self._wrong), dtype=np.float32))
        return DraftFinished(np.tile(self._wrong, (num_rows, 1)), np.tile(log_probs, (num_rows, 1)))


@pytest.mark.parametrize("testbed", known_testbeds())
def test_a_drafter_that_is_always_wrong_costs_nothing(tapes: list[Tape], limits: TargetLimits, testbed: str) -> None:
    plain, speculating = (
        tokens_per_s(testbed, schedule, tapes, WrongDrafter, limits) for schedule in ("autoregressive", "flowspec")
    )
    assert speculating >= 0.99 * plain


def test_text_that_repeats_itself_needs_no_draft_head(two_stages: Testbed) -> None:
    tape = make_tape(6, [1, 2, 3, 4, 1, 2, *([3, 4, 1, 2] * 12)])
    limits = TargetLimits(max_context=256, vocab_size=13, eos_token_ids=frozenset())
    seconds = {}
    for schedule in ("autoregressive", "flowspec"):
        options = GenerateOptions(max_new_tokens=48, schedule=schedule)
        answer = VirtualRing(two_stages, tape, None, limits).generate(options)
        assert answer.tokens == list(tape.continuation)
        seconds[schedule] = answer.decode_s
    assert seconds["flowspec"] < 0.7 * seconds["autoregressive"]
