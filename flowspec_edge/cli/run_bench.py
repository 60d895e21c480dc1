"""What ``flowspec bench`` and ``flowspec trace`` do, once their options are read."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import platform
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any

from flowspec_edge.bench.ablation import add_shares, format_shares
from flowspec_edge.bench.calibrate import calibrate, format_precisions, format_testbed
from flowspec_edge.bench.charts import draw_bars
from flowspec_edge.bench.compare import Bench, Task, run_tasks
from flowspec_edge.bench.emulate import compare_with_virtual, emulated_boards, format_comparison
from flowspec_edge.bench.lengths import EMULATED_TOKENS, VIRTUAL_TOKENS
from flowspec_edge.bench.prompts import choose_sets, load_chat_prompts
from flowspec_edge.bench.report import build_report, format_report
from flowspec_edge.bench.request import Request
from flowspec_edge.bench.sessions import format_sessions, measure_sessions
from flowspec_edge.bench.slow_core import slow_core
from flowspec_edge.bench.tensor_parallel import MODELLED
from flowspec_edge.bench.testbed import Testbed, describe_testbed, load_testbed
from flowspec_edge.bench.timeline import Timeline, draw_timeline
from flowspec_edge.bundle import Bundle
from flowspec_edge.cli.json_report import PartlyDoneError
from flowspec_edge.cli.layout import fitted, terminal_width
from flowspec_edge.cli.show_progress import Progress
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core.speculation.schedules import find_schedule
from flowspec_edge.errors import BenchError, RequestError
from flowspec_edge.node.precision_choice import keep_precision

QUICK_PROMPTS, QUICK_EMULATED_PROMPTS = 2, 1
"""How many prompts of each set a quick comparison takes."""


async def run_virtual(
    bundle: Bundle, request: Request, *, num_processes: int, is_ablation: bool, is_json: bool, plot: Path | None
) -> int:
    """Compare schedules on the virtual clock and print the tables. Returns an exit status.

    Raises:
        FlowspecError: a name is not known, a number is out of range, or a run failed.
    """
    names = request.schedule_names(is_ablation)
    plan = request.plan([name for name in names if name not in MODELLED], VIRTUAL_TOKENS)
    tasks = request.tasks(plan, QUICK_PROMPTS, is_chat=bundle.manifest.chat_template is not None)
    if num_processes < 1:
        raise RequestError(f"--processes is {num_processes}; it must be at least 1")
    if plot is not None:
        _make_folder(plot)
    progress = Progress(f"{len(plan.schedules)} schedules on {len(plan.testbeds)} testbed(s)", len(tasks))
    try:
        outcomes = await run_tasks(plan, tasks, bundle, num_processes=num_processes, on_finish=progress.step)
    finally:
        progress.close()
    reports = [build_report(testbed, outcomes, names, plan.max_new_tokens) for testbed in plan.testbeds]
    for report in reports:
        if is_ablation:
            add_shares(report)
    if plot is not None:
        try:
            _draw(reports, plot)
        except BenchError as cause:
            raise PartlyDoneError({"reports": reports}, cause) from cause
    if is_json:
        print(json.dumps(reports[0] if len(reports) == 1 else reports))
    else:
        _show(format_report(report) + (format_shares(report) if is_ablation else "") for report in reports)
    return 0


async def run_sessions(bundle: Bundle, request: Request, *, is_json: bool) -> int:
    """Compare numbers of clients on the virtual clock and print the tables. Returns an exit status.

    Raises:
        FlowspecError: a name is not known, a number is out of range, or a run failed.
    """
    numbers = request.session_numbers()
    plan = request.plan(request.running_names(), VIRTUAL_TOKENS)
    tasks = request.tasks(plan, QUICK_PROMPTS, is_chat=bundle.manifest.chat_template is not None)
    num_runs = len(plan.testbeds) * len(plan.schedules) * len({task.temperature for task in tasks}) * len(numbers)
    progress = Progress(f"{', '.join(map(str, numbers))} sessions on {len(plan.testbeds)} testbed(s)", num_runs, "runs")
    try:
        bench = await asyncio.to_thread(Bench, bundle)
        reports = await asyncio.to_thread(measure_sessions, bench, plan, tasks, numbers, progress.step)
    finally:
        progress.close()
    if is_json:
        print(json.dumps(reports[0] if len(reports) == 1 else reports))
    else:
        _show(map(format_sessions, reports))
    return 0


def _show(tables: Iterable[str]) -> None:
    print(fitted("\n\n".join(tables), terminal_width()))


def _draw(reports: Sequence[dict[str, Any]], folder: Path) -> None:
    for report in reports:
        path = folder / f"{report['testbed']}.svg"
        _write(path, draw_bars(report))
        print(f"drawn: {path}", file=sys.stderr)


async def run_emulated(bundle: Bundle, request: Request, *, slow_origin: float, is_json: bool) -> int:
    """Run schedules on emulated boards in real time, and print how far from the virtual clock they are. The origin's
    event loop is on a core that is ``slow_origin`` times as slow.

    Returns an exit status.

    Raises:
        FlowspecError: a name is not known, a number is out of range, or a run failed.
    """
    plan = request.plan(request.running_names(), EMULATED_TOKENS, len(bundle.manifest.blocks))
    tasks = request.tasks(plan, QUICK_EMULATED_PROMPTS, is_chat=bundle.manifest.chat_template is not None)
    bench = await asyncio.to_thread(Bench, bundle)
    num_generations = len(plan.testbeds) * len(tasks) * len(plan.schedules)
    progress = Progress("in real time", num_generations, "generations")
    reports = {}
    try:
        with slow_core(slow_origin):
            for testbed in plan.testbeds:
                async with _described(testbed) as source, emulated_boards(testbed, source, bundle) as boards:
                    reports[testbed] = await compare_with_virtual(boards, bench, plan, tasks, progress.step)
    finally:
        progress.close()
    if is_json:
        found = [
            {
                "testbed": testbed.name,
                "max_new_tokens": plan.max_new_tokens,
                "slow_origin": slow_origin,
                "rows": rows,
            }
            for testbed, rows in reports.items()
        ]
        print(json.dumps(found[0] if len(found) == 1 else found))
    else:
        _show(format_comparison(testbed, rows) for testbed, rows in reports.items())
    return 0


async def run_calibration(
    bundle: Bundle, *, num_threads: int, sizes_in_use: Sequence[int], uses_fastest: bool, is_json: bool
) -> int:
    """Measure this device and print a testbed of it. Returns an exit status.

    With ``uses_fastest`` the nodes of this user run the bundle in the fastest precision from then on.

    Raises:
        FlowspecError: the bundle cannot be loaded, or the choice cannot be kept.
    """
    found = await asyncio.to_thread(
        calibrate, bundle, num_threads=num_threads, sizes_in_use=sizes_in_use, report=_report_measuring
    )
    best = found.fastest_precision
    if uses_fastest:
        keep_precision(bundle.digest, best)
        print(f"{bundle.manifest.name}: runs in {best} here from the next ring on", file=sys.stderr)
    elif len(found.precision_ms) > 1:
        print(
            f"to run {bundle.manifest.name} in {best} here: flowspec bench --calibrate --use-fastest", file=sys.stderr
        )
    if is_json:
        quality = [dataclasses.asdict(entry) for entry in bundle.manifest.quality]
        print(json.dumps({**dataclasses.asdict(found), "fastest_precision": best, "quality": quality}))
    else:
        print(format_precisions(found, bundle.manifest.quality), end="\n\n")
        threads = f"{num_threads} thread{'s' if num_threads > 1 else ''}"
        source = f"flowspec bench --calibrate on {platform.machine()}, {threads}, {time.strftime('%Y-%m-%d')}"
        print(format_testbed(found, source))
    return 0


def _report_measuring(what: str) -> None:
    if sys.stderr.isatty():
        print(f"measuring: {what}", file=sys.stderr)


async def run_trace(
    *,
    bundle: Bundle,
    testbed: str,
    schedule: str,
    prompt_set: str,
    number: int,
    temperature: float,
    max_new_tokens: int,
    out: Path,
) -> int:
    """Draw one generation. Returns an exit status.

    Raises:
        FlowspecError: a name is not known, a number is out of range, or the file cannot be written.
    """
    board = load_testbed(testbed)
    find_schedule(schedule)
    if out.suffix.lower() != ".svg":
        raise RequestError(
            f"--out is {out}; give a name that ends in .svg (rsvg-convert or a browser makes a PNG of it)"
        )
    texts = choose_sets([prompt_set])[prompt_set]
    if not 0 <= number < len(texts):
        raise RequestError(f"--index is {number}; set {prompt_set!r} has prompts 0 to {len(texts) - 1}")
    task = Task(
        prompt_set=prompt_set,
        seed=number,
        temperature=temperature,
        text=texts[number],
        is_message=prompt_set in load_chat_prompts(),
    )
    options = GenerateOptions(max_new_tokens=max_new_tokens, temperature=temperature, seed=number, schedule=schedule)
    picture = await asyncio.to_thread(_trace, bundle, board, task, options)
    _write(out, picture)
    print(f"drawn: {out}", file=sys.stderr)
    return 0


def _trace(bundle: Bundle, testbed: Testbed, task: Task, options: GenerateOptions) -> str:
    bench = Bench(bundle)
    tape = bench.record(task, options)
    timeline = Timeline()
    answer = bench.play(testbed, tape, options, timeline)
    heading = f"{options.schedule} on {testbed.name}  ({task.prompt_set} {task.seed}, temperature {task.temperature:g})"
    return draw_timeline(timeline, testbed, tape, answer, heading)


@contextlib.asynccontextmanager
async def _described(testbed: Testbed) -> AsyncIterator[str]:
    """A file that describes the testbed, for node processes to read."""
    with tempfile.TemporaryDirectory(prefix="flowspec-") as folder:
        path = Path(folder) / f"{testbed.name}.toml"
        _write(path, describe_testbed(testbed, "made by flowspec bench --emulate"))
        yield str(path)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise BenchError(f"{path}: no folder can be made here ({cause.strerror})") from cause


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as cause:
        raise BenchError(f"{path}: cannot be written ({cause.strerror})") from cause
