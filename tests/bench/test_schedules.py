"""Laws of the schedules, on the virtual clock, which is exact."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from flowspec_edge.bench.compare import Bench, Task
from flowspec_edge.bench.known_testbeds import known_testbeds
from flowspec_edge.bench.prompts import load_prompts
from flowspec_edge.bench.tape import Tape
from flowspec_edge.bench.testbed import StageCost, Testbed, load_testbed
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
NUM_GUESSED = 64
NEVER = 512
"""Tokens from here on are in no text."""
MOST_TRIED = 5
"""Tokens in whose time it is tried what drafts bring."""


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


class GuessingDrafter:
    """Its first proposal is the text's next token in ``share`` of all places, and its second one in a tenth of them.

    All others never come, whatever it says of them.
    """

    def __init__(self, tape: Tape, share: float) -> None:
        self._tape = tape
        luck = np.random.default_rng(1).random(len(tape.tokens))
        self._right = np.where(luck < share, 0, np.where(luck < share + 0.1, 1, -1)).tolist()
        self._log_probs = np.log([max(share, 0.1), *(0.1 * 0.5 ** np.arange(1, 10))]).astype(np.float32)

    def open(self, session: int, capacity: int) -> None:
        pass

    def close(self, session: int) -> None:
        pass

    def run(self, job: RunDraft) -> DraftFinished:
        tokens, first = self._tape.tokens, max(len(job.hidden) - 1, 0)
        proposed = np.tile(np.arange(NEVER, NEVER + 10), (len(job.rows) - first, 1))
        for row, position, proposals in zip(job.rows[first:], job.positions[first:].tolist(), proposed, strict=True):
            following = position + 2
            is_text = following < len(tokens) and tokens[position + 1] == row.token
            if is_text and self._right[following] >= 0:
                proposals[self._right[following]] = tokens[following]
        return DraftFinished(proposed, np.tile(self._log_probs, (len(proposed), 1)))


@pytest.fixture(scope="module")
def unrepeated() -> Tape:
    """A text in which nothing is to be looked up."""
    tokens = np.random.default_rng(0).permutation(NEVER)[: 8 + NUM_GUESSED]
    logits = np.zeros((len(tokens), NEVER + 10), np.float32)
    logits[np.arange(len(tokens) - 1), tokens[1:]] = 1
    return Tape(8, tuple(tokens.tolist()), np.zeros((len(tokens), 4), np.float32), logits)


@pytest.mark.parametrize("share", [0.0, 0.6, 0.9])
@pytest.mark.parametrize("row_share", [0.01, 0.3, 0.99])
@pytest.mark.parametrize(("num_stages", "num_layers"), [(1, 1), (1, 28), (2, 1), (3, 2)])
def test_flowspec_is_never_slower_than_plain_decoding(
    unrepeated: Tape, num_stages: int, num_layers: int, row_share: float, share: float
) -> None:
    """Whether a forward can be given up, whatever rows cost, and whatever drafts are worth.

    A token takes 110 ms of the stages. What drafts bring has to be tried, which may cost the time of some tokens.
    """
    stage = StageCost(
        fixed_ms=110 / num_stages * (1 - row_share), row_ms=110 / num_stages * row_share, num_layers=num_layers
    )
    testbed = Testbed(
        name="a ring",
        stages=(stage,) * num_stages,
        hop_ms=1,
        rate_mbit_per_s=1000,
        hidden_bytes=12288,
        head_ms=5,
        draft_pass_ms=25,
        draft_row_ms=2.5,
    )
    limits = TargetLimits(max_context=1024, vocab_size=NEVER + 10, eos_token_ids=frozenset())
    seconds = {}
    for schedule in ("autoregressive", "flowspec"):
        options = GenerateOptions(max_new_tokens=NUM_GUESSED, schedule=schedule)
        answer = VirtualRing(testbed, unrepeated, GuessingDrafter(unrepeated, share), limits).generate(options)
        assert answer.tokens == list(unrepeated.continuation)
        seconds[schedule] = answer.decode_s
    plain_token_s = seconds["autoregressive"] / (NUM_GUESSED - 1)
    assert seconds["flowspec"] <= seconds["autoregressive"] + MOST_TRIED * plain_token_s


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
