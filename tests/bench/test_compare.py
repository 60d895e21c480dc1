"""From tasks to the table: what is counted, what it is divided by, and that the number of processes changes nothing."""

import asyncio
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from flowspec_edge.bench import ablation
from flowspec_edge.bench.charts import draw_bars
from flowspec_edge.bench.compare import Bench, Figures, Outcome, Plan, Task, run_tasks
from flowspec_edge.bench.prompts import choose_sets, load_chat_prompts, load_prompts
from flowspec_edge.bench.remembered_drafts import RememberedDrafts
from flowspec_edge.bench.report import LOOPING, build_report, format_report
from flowspec_edge.bench.request import Request
from flowspec_edge.bench.tensor_parallel import GALAXY, MEGA_LM, forward_ms, model_figures
from flowspec_edge.bench.testbed import Testbed, load_testbed
from flowspec_edge.bench.virtual_clock import VirtualRing
from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core.events import DraftFinished, RunDraft
from flowspec_edge.core.line import fit_line
from flowspec_edge.core.planning.throughput import tokens_of_best_rows as tau
from flowspec_edge.core.speculation.generation import TargetLimits
from flowspec_edge.engine.drafters.eagle1 import Eagle1Drafter
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.errors import BenchError, LosslessError
from tests.bench.conftest import make_tape


def outcome_of(
    prompt_set: str, testbed: Testbed, rates: Mapping[str, float], *, is_looping: bool = False, temperature: float = 0.0
) -> Outcome:
    """A task whose schedules decoded 100 tokens at these rates."""
    task = Task(prompt_set=prompt_set, seed=0, temperature=temperature, text="")
    figures = {
        (testbed.name, schedule): Figures(
            num_generations=1,
            num_decoded=100,
            decode_s=100 / rate,
            num_tokens=101,
            num_verifications=51,
            num_rows_sent=500,
            num_draft_passes=100,
            row_seconds=100 / rate * 2,
            num_forwards=10,
            num_forward_rows=30,
        )
        for schedule, rate in rates.items()
    }
    return Outcome(task, is_looping, {False: [(1, 5), (3,)], True: [(1, 4), (2,)]}, figures)


@pytest.fixture
def report(two_stages: Testbed) -> dict[str, Any]:
    outcomes = [
        outcome_of("first", two_stages, {"chunked": 10.0, "flowspec": 20.0}),
        outcome_of("first", two_stages, {"chunked": 5.0, "flowspec": 15.0}),
        outcome_of("second", two_stages, {"chunked": 10.0, "flowspec": 15.0}),
        outcome_of("second", two_stages, {"chunked": 10.0, "flowspec": 90.0}, is_looping=True),
    ]
    return build_report(two_stages, outcomes, ["chunked", "flowspec", MEGA_LM], 96)


def test_rates_are_tokens_over_seconds_and_means_are_over_sets(report: dict[str, Any], two_stages: Testbed) -> None:
    rows = {(row["schedule"], row["prompt_set"]): row for row in report["rows"]}
    first = rows["flowspec", "first"]
    assert first["tokens_per_s"] == pytest.approx(200 / (5 + 100 / 15))
    assert first["speedup_over_chunked"] == pytest.approx((10 + 20) / (5 + 100 / 15))
    assert first["acceptance_length"] == pytest.approx(202 / 102)
    assert first["bound_tokens_per_s"] == pytest.approx(1.5 / two_stages.trip_ms(3) * 1000)
    assert first["num_prompts"] == 2
    mean = report["mean"]["flowspec"]["0"]
    assert mean["tokens_per_s"] == pytest.approx((first["tokens_per_s"] + 15) / 2)
    assert mean["speedup_over_chunked"] == pytest.approx((first["speedup_over_chunked"] + 1.5) / 2)
    assert mean["num_prompts"] == 3
    assert rows["flowspec", LOOPING]["tokens_per_s"] == pytest.approx(90)


def test_the_report_is_json_and_a_table(report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(report)) == report
    assert set(report) >= {"testbed", "rows", "mean"}
    for row in report["rows"]:
        assert set(row) >= {
            *("schedule", "prompt_set", "temperature", "tokens_per_s", "speedup_over_chunked"),
            *("acceptance_length", "bound_tokens_per_s"),
        }
    lines = format_report(report).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({len(line) for line in table}) == 1, "columns are aligned"
    assert "mega-lm (modelled)" in table[-1]


def test_bars_are_well_formed_and_name_every_schedule(report: dict[str, Any]) -> None:
    picture = draw_bars(report)
    ElementTree.fromstring(picture)
    assert all(name in picture for name in ("flowspec", "chunked", "mega-lm", "first", "second", "mean"))


def test_a_set_of_looping_outputs_alone_has_no_row(two_stages: Testbed) -> None:
    outcomes = [outcome_of("only", two_stages, {"chunked": 10.0}, is_looping=True)]
    report = build_report(two_stages, outcomes, ["chunked"], 96)
    assert [row["prompt_set"] for row in report["rows"]] == [LOOPING]
    assert report["mean"]["chunked"]["0"]["tokens_per_s"] is None
    format_report(report)
    ElementTree.fromstring(draw_bars(report))


def test_tau_counts_accepted_rows_among_the_best() -> None:
    places = [(1, 5), (3,)]
    assert [tau(places, n) for n in (1, 2, 4, 6, 100)] == [1.0, 1.5, 2.0, 2.5, 2.5]
    assert tau(places, 1.5) == 1.25
    assert tau([], 10) == 1.0


def test_tensor_parallel_baselines_by_hand(two_stages: Testbed) -> None:
    # 10 layers of 2.2 and 4.4 ms alone at one row make 22/15 ms together; half a row's bytes take 0.5 ms.
    layer_ms, message_ms = 22 / 15, 3.5
    assert forward_ms(MEGA_LM, two_stages, 1) == pytest.approx(10 * (layer_ms + 4 * message_ms))
    assert forward_ms(GALAXY, two_stages, 1) == pytest.approx(10 * 4 * (layer_ms / 8 + message_ms))
    chunked = Figures(num_generations=1, num_decoded=20, num_verifications=11, num_rows_sent=10, num_draft_passes=20)
    step_ms = 2 * 7 + 3 + forward_ms(MEGA_LM, two_stages, 1) + 5
    assert model_figures(MEGA_LM, two_stages, chunked).decode_s == pytest.approx(10 * step_ms / 1000)


def test_fit_line() -> None:
    line = fit_line([1, 2, 4], [3.0, 5.0, 9.0])
    assert (line.fixed, line.per_row) == pytest.approx((1.0, 2.0))
    assert fit_line([1, 2, 4], [5.0, 5.0, 4.0]).per_row == 0.0


def test_shares_of_mechanisms(two_stages: Testbed) -> None:
    rates = {"chunked": 5.0, "flowspec": 10.0, "flowspec-without-cancelling": 9.0}
    report = build_report(two_stages, [outcome_of("one", two_stages, rates)], list(rates), 96)
    ablation.add_shares(report)
    assert report["ablation"]["flowspec-without-cancelling"]["0"]["lost"] == pytest.approx(0.1)
    assert "-10.0%" in ablation.format_shares(report)


def test_every_set_has_enough_prompts_that_differ() -> None:
    sets = load_prompts()
    assert len(sets) == 6
    for texts in sets.values():
        assert len(set(texts)) == len(texts) >= 20
    messages = load_chat_prompts()
    assert list(messages) == ["explain", "list", "rewrite", "code", "json", "story"]
    for texts in messages.values():
        assert len(set(texts)) == len(texts) == 10
    assert choose_sets(["story", "tests"]) == {"story": messages["story"], "tests": sets["tests"]}
    with pytest.raises(BenchError, match="'poems' is not known"):
        choose_sets(["poems"])


def test_messages_are_written_by_the_chat_template(bench: Bench, bundle: Bundle) -> None:
    request = Request(testbeds="mixed", schedules="chunked", prompts="quick", temperatures="0")
    plan = request.plan(["chunked"], 2)
    task, *others = request.tasks(plan, 1, is_chat=True)
    assert [task.prompt_set, *(other.prompt_set for other in others)] == list(load_chat_prompts())
    assert [other.prompt_set for other in request.tasks(plan, 1)] == list(load_prompts())
    template = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<answer>"
    chat = replace(bundle, manifest=replace(bundle.manifest, chat_template=template))
    tape = Bench(chat).record(task, task.options(plan))
    written = Tokenizer(bundle.directory / bundle.manifest.tokenizer.file).decode(list(tape.prompt))
    assert written == f"<user>{load_chat_prompts()['explain'][0]}<answer>"
    with pytest.raises(BenchError, match=r"of set 'explain' is a message .* no chat template; choose .* functions, "):
        bench.record(task, task.options(plan))


def test_another_text_than_the_targets_is_an_error(bench: Bench, two_stages: Testbed) -> None:
    tape = make_tape(3, [1, 2, 3, 4, 5, 6])
    with pytest.raises(LosslessError, match=r"chunked on two-stages wrote \d+ tokens, the target 3"):
        bench.play(two_stages, tape, GenerateOptions(max_new_tokens=1, schedule="chunked"))


@pytest.mark.slow
def test_processes_do_not_change_the_figures(bundle: Bundle) -> None:
    plan = Plan(testbeds=(load_testbed("mixed"),), schedules=("chunked", "flowspec"), max_new_tokens=12)
    texts = load_prompts()["tables"][:3]
    tasks = [Task(prompt_set="tables", seed=i, temperature=0.6, text=text) for i, text in enumerate(texts)]

    def run(num_processes: int) -> list[Outcome]:
        calls = []
        done = run_tasks(plan, tasks, bundle, num_processes=num_processes, on_finish=lambda: calls.append(1))
        outcomes = asyncio.run(done)
        assert len(calls) == len(tasks)
        return outcomes

    assert run(1) == run(2)


def test_remembered_drafts_are_the_drafters_own_and_run_once(bench: Bench, bundle: Bundle) -> None:
    head = Head(bundle.directory, bundle.manifest)
    real = Eagle1Drafter(bundle.directory, bundle.manifest, head, k=10)
    ran: list[RunDraft] = []

    def run(job: RunDraft) -> DraftFinished:
        ran.append(job)
        return real.run(job)

    watched = SimpleNamespace(open=real.open, close=real.close, run=run)
    drafts = RememberedDrafts(watched)
    task = Task(prompt_set="functions", seed=0, temperature=0.0, text=load_prompts()["functions"][0])
    tape = bench.record(task, GenerateOptions(max_new_tokens=24))
    limits = TargetLimits(1024, bundle.manifest.geometry.vocab_size, frozenset(bundle.manifest.eos_token_ids))

    def play(drafter: RememberedDrafts | Eagle1Drafter, schedule: str) -> list[float]:
        ring = VirtualRing(load_testbed("mixed"), tape, drafter, limits)
        return ring.generate(GenerateOptions(max_new_tokens=24, schedule=schedule)).token_times_s

    for schedule in ("chunked", "pruned", "flowspec", "lockstep"):
        assert play(drafts, schedule) == play(real, schedule)
    num_ran = len(ran)
    for schedule in ("lockstep", "chunked"):
        play(drafts, schedule)
    assert len(ran) == num_ran
