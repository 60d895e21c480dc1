"""The options of ``flowspec bench`` and ``flowspec trace``. Light: every command builds all parsers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flowspec_edge.bench.testbed import known_testbeds

DEFAULT_TESTBED = "jetson4-7b-fp16-1gbit"
EMULATED_SCHEDULES = "autoregressive,chunked,pipedec,flowspec"
VIRTUAL_TOKENS, EMULATED_TOKENS = 96, 48
"""What runs in real time is short by default: with these, about three minutes on a testbed."""

BENCH_DESCRIPTION = """\
Compare schedules on boards that need not be there. --virtual runs the real cores on simulated time: the texts and what is
accepted come from the real model and its draft head on this machine, and how long each step takes from a testbed, a file
that describes boards and network. The same command prints the same digits. --emulate runs the same generations in real time:
node processes on this machine, real sockets and forwards, each held to the testbed's time; it prints how far from the virtual
clock they are, and how late this machine was.
"""

BENCH_EPILOG = """\
examples:
  flowspec bench --virtual                                 a glance: two prompts of each set, greedy, the paper's boards
  flowspec bench --virtual --prompts all --temperature 0,0.6,1        the paper's table, whole
  flowspec bench --virtual --testbed all --schedules chunked,flowspec --plot plots
  flowspec bench --emulate                                 four schedules in real time, beside the virtual clock
  flowspec bench --calibrate --bundle DIR --use-fastest    compare the bundle's precisions here, and keep to the fastest
  flowspec bench --calibrate > mine.toml                   what this device costs; edit, then --testbed mine.toml

schedules: autoregressive, chunked, pruned, pipedec, lockstep, flowspec; mega-lm and galaxy are modelled, not run
prompt sets: functions, classes, docstrings, tables, tests, edits
testbeds:
{testbeds}

tokens/s (xi) = tokens after the first / simulated seconds for them; SR = xi / xi of chunked; tau = tokens per verification;
bound = tau(draft rows under way) / time of a trip that waits for nobody. Means are over prompt sets; outputs that repeat
themselves are kept apart.
"""


def add_bench(commands: Any) -> argparse.ArgumentParser:
    """``flowspec bench``, without the bundle."""
    bench: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="compare schedules on simulated boards, or measure this one",
        description=BENCH_DESCRIPTION,
        epilog=BENCH_EPILOG.format(testbeds="\n".join(f"  {name}" for name in known_testbeds())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    mode = bench.add_mutually_exclusive_group(required=True)
    mode.add_argument("--virtual", action="store_true", help="run schedules on simulated time")
    mode.add_argument("--emulate", action="store_true", help="run schedules in real time, on processes of this machine")
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
        help="with --calibrate: nodes here run the bundle in the precision that was the fastest, unless --precision says "
        "otherwise; look at its quality in the table first",
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
        help="prompt sets, all, or quick: two prompts of each set, emulated one (default: %(default)s)",
    )
    bench.add_argument("--temperature", default="0", metavar="T[,T]", help="0 is greedy (default: %(default)s)")
    bench.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"length of each text (default: {VIRTUAL_TOKENS}, emulated: {EMULATED_TOKENS})",
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
    return bench


def add_trace(commands: Any) -> argparse.ArgumentParser:
    """``flowspec trace``, without the bundle."""
    trace: argparse.ArgumentParser = commands.add_parser(
        "trace",
        help="draw one generation on simulated boards: what each stage ran when, and what became of it",
        description="Draw one generation on the virtual clock as SVG: a lane per stage, a box per chunk with the share of its "
        "rows that became text, the origin's work, and a line for each Advance.",
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
    return trace
