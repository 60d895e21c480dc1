"""The virtual clock is exact: times follow from the testbed by hand, and nothing but time is simulated."""

import dataclasses
import json

import numpy as np
import pytest

from flowspec_edge.bench.compare import Bench, Task
from flowspec_edge.bench.prompts import load_prompts
from flowspec_edge.bench.tape import Tape, TapeRecorder
from flowspec_edge.bench.testbed import Testbed, load_testbed
from flowspec_edge.bench.virtual_clock import VirtualAnswer, VirtualRing
from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.config import GenerateOptions, Grammar
from flowspec_edge.core.speculation.generation import TargetLimits
from flowspec_edge.core.speculation.schedules import SCHEDULES
from flowspec_edge.core.wire import ROW_BYTES
from flowspec_edge.engine.drafters.eagle1 import Eagle1Drafter
from flowspec_edge.engine.grammar import Grammars
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.engine.unsplit import UnsplitModel
from tests.bench.conftest import make_tape

LIMITS = TargetLimits(max_context=256, vocab_size=13, eos_token_ids=frozenset())


def run_plain(testbed: Testbed, num_tokens: int = 6) -> VirtualAnswer:
    tape = make_tape(3, [1, 2, 3, *([4, 5] * num_tokens)[:num_tokens]])
    options = GenerateOptions(max_new_tokens=num_tokens, schedule="autoregressive")
    return VirtualRing(testbed, tape, None, LIMITS).generate(options)


def test_plain_pipelining_takes_what_the_testbed_says(two_stages: Testbed) -> None:
    answer = run_plain(two_stages)
    row_ms = ROW_BYTES * 8 / 8000  # ids and token of one row at 8 Mbit/s
    trip_ms = (3 + row_ms) + 11 + 2 * (3 + 1 + row_ms) + 22 + 5
    assert answer.tokens == [4, 5, 4, 5, 4, 5]
    assert answer.tokens_per_s == pytest.approx(1000 / trip_ms, rel=1e-9)
    assert answer.num_decoded == 5
    assert answer.busy_s == pytest.approx([0.010 + 3 * 0.001 + 5 * 0.011, 0.020 + 3 * 0.002 + 5 * 0.022, 6 * 0.005])


def test_figures_behind_the_bound(two_stages: Testbed) -> None:
    """One row under way for all of the time but the head's, and forwards of one row each."""
    answer = run_plain(two_stages)
    assert answer.row_seconds / answer.decode_s == pytest.approx(1 - 5 * 0.005 / answer.decode_s)
    assert (answer.num_forwards, answer.num_forward_rows) == (10, 10)


def test_a_slow_wire_is_waited_for(two_stages: Testbed) -> None:
    slow = dataclasses.replace(two_stages, rate_mbit_per_s=0.8)
    assert 1 / run_plain(slow).tokens_per_s - 1 / run_plain(two_stages).tokens_per_s == pytest.approx(
        (3 * ROW_BYTES + 2 * 1000) * 8 * 9 / 8e6
    )


@pytest.fixture(scope="module")
def task() -> Task:
    return Task(prompt_set="functions", seed=3, temperature=0.0, text=load_prompts()["functions"][3])


@pytest.fixture(scope="module")
def tape(bench: Bench, task: Task) -> Tape:
    return bench.record(task, GenerateOptions(max_new_tokens=24))


def test_a_tape_is_what_the_unsplit_model_says(bundle: Bundle, tape: Tape) -> None:
    unsplit = UnsplitModel(bundle.directory, bundle.manifest)
    assert list(unsplit.generate(list(tape.prompt), GenerateOptions(max_new_tokens=24))) == list(tape.continuation)
    last = tape.num_prompt - 1
    assert np.argmax(tape.logits[last:-1], axis=1).tolist() == list(tape.continuation)


@pytest.mark.parametrize("testbed", ["jetson4-7b-int4-150mbit", "mixed"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_writes_the_unsplit_models_text_and_repeats_itself(
    bench: Bench, tape: Tape, schedule: str, testbed: str
) -> None:
    options = GenerateOptions(max_new_tokens=24, schedule=schedule)
    first, second = (bench.play(load_testbed(testbed), tape, options) for _ in range(2))
    assert first.tokens == list(tape.continuation)
    assert first.token_times_s == second.token_times_s
    assert first.statistics == second.statistics


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_text_that_follows_a_schema_is_the_targets_under_each_schedule(temperature: float) -> None:
    bundle, schema = Bundle.load(DEMO_BUNDLE), {"type": "array", "items": {"type": "boolean"}, "minItems": 5}
    tokenizer, geometry = Tokenizer(DEMO_BUNDLE / "tokenizer.json"), bundle.manifest.geometry
    options = GenerateOptions(
        max_new_tokens=24, temperature=temperature, seed=2, grammar=Grammar("json", json.dumps(schema))
    )
    tape = TapeRecorder(bundle).record(tokenizer.encode("def main("), options)
    assert tokenizer.decode(tape.continuation).startswith(("[true, ", "[false, "))
    grammars = Grammars(tokenizer, geometry.vocab_size, bundle.manifest.eos_token_ids)
    limits = TargetLimits(geometry.max_context, geometry.vocab_size, frozenset(bundle.manifest.eos_token_ids))
    for schedule in SCHEDULES:
        asked = dataclasses.replace(options, schedule=schedule)
        drafter = Eagle1Drafter(bundle.directory, bundle.manifest, Head(bundle.directory, bundle.manifest), k=64)
        constraint = grammars.compile(Grammar("json", json.dumps(schema)))
        ring = VirtualRing(load_testbed("jetson4-7b-fp16-1gbit"), tape, drafter, limits, constraint=constraint)
        assert tuple(ring.generate(asked).tokens) == tape.continuation
