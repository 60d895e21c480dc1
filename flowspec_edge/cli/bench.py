"""``flowspec bench`` and ``flowspec trace`` as they are called; ``run_bench.py`` does them.

Every command builds all parsers, so nothing heavy is imported here.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from flowspec_edge.bench.known_testbeds import known_testbeds
from flowspec_edge.bench.lengths import EMULATED_TOKENS, VIRTUAL_TOKENS
from flowspec_edge.cli.options import BundleArguments, Commands, add_bundle, bundle_from, set_command
from flowspec_edge.errors import RequestError

DEFAULT_TESTBED = "jetson4-7b-fp16-1gbit"
EMULATED_SCHEDULES = "autoregressive,chunked,pipedec,flowspec"
BENCH_DESCRIPTION = """\
Compare schedules on boards that need not be there. --virtual runs the real cores on simulated time: the texts and \
what is
accepted come from the real model and its draft head on this machine, and how long each step takes from a testbed, a \
file
that describes boards and network. The same command prints the same digits. --emulate runs the same generations in \
real time:
node processes on this machine, real sockets and forwards, each held to the testbed's time; it prints how far from \
the virtual
clock they are, and how late this machine was.
"""

BENCH_EPILOG = """\
examples:
  flowspec bench --virtual                                 a glance: two prompts of each set, greedy, the paper's boards
  flowspec bench --virtual --prompts all --temperature 0,0.6,1        the paper's table, whole
  flowspec bench --virtual --testbed all --schedules chunked,flowspec --plot plots
  flowspec bench --virtual --sessions 1,2,4                what several clients get together, and each of them
  flowspec bench --virtual --bundle CHAT.gguf --prompts all --max-new-tokens 128     a chat model on messages
  flowspec bench --emulate                                 four schedules in real time, beside the virtual clock
  flowspec bench --calibrate --bundle DIR --use-fastest    compare the bundle's precisions here, and keep to the fastest
  flowspec bench --calibrate > mine.toml                   what this device costs; edit, then --testbed mine.toml

schedules: autoregressive, chunked, pruned, pipedec, lockstep, flowspec; mega-lm and galaxy are modelled, not run
prompt sets: functions, classes, docstrings, tables, tests, edits; explain, list, rewrite, code, json, story, which are
messages to models that have a chat template
testbeds:
{testbeds}

tokens/s (xi) = tokens after the first / simulated seconds for them; SR = xi / xi of chunked; tau = tokens per \
verification;
bound = tau(draft rows under way) / time of a trip that waits for nobody. Means are over prompt sets; outputs that \
repeat
themselves are kept apart.
"""


@dataclass(frozen=True, kw_only=True)
class BenchCommand(BundleArguments):
    virtual: bool
    emulate: bool
    slow_origin: float
    calibrate: bool
    chunk_sizes: str
    use_fastest: bool
    testbed: str
    schedules: str | None
    prompts: str
    temperature: str
    max_new_tokens: int | None
    sessions: str
    num_prompts: int | None
    processes: int | None
    planned: bool
    threads: int
    ablate: bool
    plot: Path | None
    json: bool


def add_bench(commands: Commands) -> None:
    bench = commands.add_parser(
        "bench",
        help="compare schedules on simulated boards, or measure this one",
        description=BENCH_DESCRIPTION,
        epilog=BENCH_EPILOG.format(testbeds="\n".join(f"  {name}" for name in known_testbeds())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    mode = bench.add_mutually_exclusive_group(required=True)
    mode.add_argument("--virtual", action="store_true", help="run schedules on simulated time")
    mode.add_argument("--emulate", action="store_true", help="run schedules in real time, on processes of this machine")
    bench.add_argument(
        "--slow-origin",
        type=float,
        default=1.0,
        metavar="TIMES",
        help="with --emulate: have this process's event loop take so many times as long, as on a slower core; a "
        "Raspberry Pi's takes about three times as long as a desktop's (default: %(default)g)",
    )
    mode.add_argument(
        "--calibrate",
        action="store_true",
        help="measure a bundle on this device, print it as a testbed, and say which of its precisions is the fastest",
    )
    bench.add_argument(
        "--chunk-sizes",
        default="1,4,16",
        metavar="ROWS[,ROWS]",
        help="compare precisions at these sizes for --calibrate: those in use (default: %(default)s)",
    )
    bench.add_argument(
        "--use-fastest",
        action="store_true",
        help="with --calibrate: nodes here run the bundle in the precision that was the fastest, unless --precision "
        "says otherwise; look at its quality in the table first",
    )
    bench.add_argument(
        "--testbed",
        default=DEFAULT_TESTBED,
        metavar="NAME[,NAME]",
        help="testbeds, a path that ends in .toml, or all (default: %(default)s)",
    )
    bench.add_argument(
        "--schedules",
        metavar="NAME[,NAME]",
        help=f"schedules (default: all; emulated: {EMULATED_SCHEDULES}); --virtual always runs chunked, its yardstick",
    )
    bench.add_argument(
        "--prompts",
        default="quick",
        metavar="SET[,SET]",
        help="prompt sets, all that are for this model, or quick: two prompts of each of them, emulated one (default: "
        "%(default)s)",
    )
    bench.add_argument("--temperature", default="0", metavar="T[,T]", help="0 is greedy (default: %(default)s)")
    bench.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"length of each text (default: {VIRTUAL_TOKENS}, emulated: {EMULATED_TOKENS})",
    )
    bench.add_argument(
        "--sessions",
        default="",
        metavar="N[,N]",
        help="with --virtual: compare so many clients on one ring instead of schedules, of which flowspec runs alone "
        "unless --schedules says otherwise",
    )
    bench.add_argument("--num-prompts", type=int, metavar="N", help="only the first N prompts of each set")
    bench.add_argument(
        "--processes", type=int, metavar="N", help="processes of --virtual (default: the cores there are)"
    )
    bench.add_argument(
        "--planned", action="store_true", help="each testbed a second time, with its layers dealt by the planner"
    )
    bench.add_argument("--threads", type=int, default=1, help="threads for --calibrate (default: %(default)s)")
    bench.add_argument(
        "--ablate", action="store_true", help="compare flowspec with itself less one mechanism each; with --virtual"
    )
    bench.add_argument(
        "--plot", type=Path, metavar="DIR", help="draw each testbed's figures to DIR/TESTBED.svg; with --virtual"
    )
    bench.add_argument(
        "--json", action="store_true", help="print one JSON object, or a list where there are more testbeds"
    )
    add_bundle(bench)
    set_command(bench, BenchCommand, _bench)


@dataclass(frozen=True, kw_only=True)
class TraceCommand(BundleArguments):
    testbed: str
    schedule: str
    out: Path
    prompt_set: str
    index: int
    temperature: float
    max_new_tokens: int


def add_trace(commands: Commands) -> None:
    trace = commands.add_parser(
        "trace",
        help="draw one generation on simulated boards: what each stage ran when, and what became of it",
        description="Draw one generation on the virtual clock as SVG: a lane per stage, a box per chunk with the share "
        "of its rows that became text, the origin's work, and a line for each Advance.",
        epilog="example: flowspec trace --schedule lockstep --out lockstep.svg",
    )
    trace.add_argument(
        "--testbed", default=DEFAULT_TESTBED, metavar="NAME", help="see flowspec bench (default: %(default)s)"
    )
    trace.add_argument("--schedule", default="flowspec", help="default: %(default)s")
    trace.add_argument("--out", type=Path, required=True, metavar="FILE.svg", help="file to write")
    trace.add_argument("--prompt-set", default="functions", metavar="SET", help="default: %(default)s")
    trace.add_argument(
        "--index", type=int, default=0, metavar="I", help="prompt of that set, from 0 (default: %(default)s)"
    )
    trace.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: %(default)s)")
    trace.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="default: %(default)s")
    add_bundle(trace)
    set_command(trace, TraceCommand, _trace)


def _chunk_sizes(text: str) -> tuple[int, ...]:
    from flowspec_edge.core.limits import MAX_CHUNK_ROWS

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= MAX_CHUNK_ROWS for part in parts):
        raise RequestError(f"--chunk-sizes is {text!r}; give numbers of rows from 1 to {MAX_CHUNK_ROWS}, as in 1,4,16")
    return tuple(dict.fromkeys(map(int, parts)))


def _usual_schedules(options: BenchCommand) -> str:
    if options.sessions:
        return "flowspec"
    return EMULATED_SCHEDULES if options.emulate else "all"


def _refuse_contradictions(options: BenchCommand) -> None:
    is_drawn = options.ablate or options.plot is not None
    if options.sessions and (is_drawn or not options.virtual):
        raise RequestError("--sessions goes with --virtual, and without --ablate and --plot")
    if options.emulate and is_drawn:
        raise RequestError("--ablate and --plot go with --virtual, not with --emulate")
    if options.slow_origin != 1 and not options.emulate:
        raise RequestError("--slow-origin goes with --emulate")


async def _bench(options: BenchCommand) -> int:
    from flowspec_edge.bench.compare import default_processes
    from flowspec_edge.bench.request import Request
    from flowspec_edge.cli.run_bench import run_calibration, run_emulated, run_sessions, run_virtual

    _refuse_contradictions(options)
    bundle = bundle_from(options)
    if options.calibrate:
        if options.threads < 1:
            raise RequestError(f"--threads is {options.threads}; it must be at least 1")
        return await run_calibration(
            bundle,
            num_threads=options.threads,
            sizes_in_use=_chunk_sizes(options.chunk_sizes),
            uses_fastest=options.use_fastest,
            is_json=options.json,
        )
    request = Request(
        testbeds=options.testbed,
        schedules=options.schedules or _usual_schedules(options),
        prompts=options.prompts,
        temperatures=options.temperature,
        num_prompts=options.num_prompts,
        max_new_tokens=options.max_new_tokens,
        sessions=options.sessions,
        is_planned=options.planned,
    )
    if options.sessions:
        return await run_sessions(bundle, request, is_json=options.json)
    if options.emulate:
        return await run_emulated(bundle, request, slow_origin=options.slow_origin, is_json=options.json)
    return await run_virtual(
        bundle,
        request,
        num_processes=default_processes() if options.processes is None else options.processes,
        is_ablation=options.ablate,
        is_json=options.json,
        plot=options.plot,
    )


async def _trace(options: TraceCommand) -> int:
    from flowspec_edge.cli.run_bench import run_trace

    return await run_trace(
        bundle=bundle_from(options),
        testbed=options.testbed,
        schedule=options.schedule,
        prompt_set=options.prompt_set,
        number=options.index,
        temperature=options.temperature,
        max_new_tokens=options.max_new_tokens,
        out=options.out,
    )
