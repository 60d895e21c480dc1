"""Laws of the schedules, on the virtual clock, which is exact."""

import numpy as np
import pytest

from flowspec_edge.bench.compare import Bench, Task
from flowspec_edge.bench.prompts import load_prompts
from flowspec_edge.bench.testbed import load_testbed, testbed_names
from flowspec_edge.bench.virtual_clock import VirtualRing
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core.drafting import DraftShape
from flowspec_edge.core.events import DraftFinished
from flowspec_edge.core.generation import TargetLimits
from flowspec_edge.core.schedules import SCHEDULES

NUM_TOKENS = 64


@pytest.fixture(scope="module")
def tapes(bench: Bench):
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
def tokens_per_s(bench, tapes):
    """By testbed and schedule, over all texts."""
    found = {}

    def measure(testbed, schedule):
        if (testbed, schedule) not in found:
            options = GenerateOptions(max_new_tokens=NUM_TOKENS, temperature=0.6, schedule=schedule)
            answers = []
            for tape in tapes:
                bench.forget_drafts()
                answers.append(bench.play(load_testbed(testbed), tape, options))
            seconds = sum(answer.decode_s for answer in answers)
            found[testbed, schedule] = sum(answer.num_decoded for answer in answers) / seconds
        return found[testbed, schedule]

    return measure


@pytest.mark.parametrize("testbed", ["jetson4-7b-fp16-1gbit", "jetson4-7b-int4-150mbit"])
def test_flowspec_leads_on_boards_where_rows_are_cheap(tokens_per_s, testbed):
    rate = {schedule: tokens_per_s(testbed, schedule) for schedule in SCHEDULES}
    assert rate["flowspec"] > 1.6 * rate["chunked"]
    assert rate["flowspec"] > max(rate["lockstep"], rate["pipedec"], rate["pruned"])
    assert rate["lockstep"] > rate["chunked"] > rate["autoregressive"]


def test_flowspec_leads_where_every_row_costs_and_trees_do_not_pay(tokens_per_s):
    rate = {schedule: tokens_per_s("pi5x4-3b-int4", schedule) for schedule in SCHEDULES}
    assert rate["flowspec"] > 1.4 * rate["autoregressive"]
    assert rate["flowspec"] > 3.5 * rate["chunked"]
    assert rate["chunked"] < rate["autoregressive"], "the published method does not pay here"


class WrongDrafter:
    """Sure of tokens that never come."""

    def __init__(self, tape):
        words = sorted(set(range(len(tape.tokens) + DraftShape().children)) - set(tape.tokens))
        self._wrong = np.array(words[: DraftShape().children])

    def open(self, session, capacity):
        pass

    def close(self, session):
        pass

    def run(self, job):
        num_rows = len(job.rows) - max(len(job.hidden) - 1, 0)
        log_probs = np.log(0.9 * 0.1 ** np.arange(len(self._wrong), dtype=np.float32))
        return DraftFinished(np.tile(self._wrong, (num_rows, 1)), np.tile(log_probs, (num_rows, 1)))


@pytest.mark.parametrize("testbed", testbed_names())
def test_a_drafter_that_is_always_wrong_costs_nothing(bench, bundle, tapes, testbed):
    limits = TargetLimits(bundle.manifest.geometry.max_context, frozenset(bundle.manifest.eos_token_ids))
    seconds = {}
    for schedule in ("autoregressive", "flowspec"):
        options = GenerateOptions(max_new_tokens=NUM_TOKENS, temperature=0.6, schedule=schedule)
        seconds[schedule] = 0.0
        for tape in tapes:
            answer = VirtualRing(load_testbed(testbed), tape, WrongDrafter(tape), limits).generate(options)
            assert answer.tokens == list(tape.continuation)
            seconds[schedule] += answer.decode_s
    assert seconds["autoregressive"] / seconds["flowspec"] >= 0.99
