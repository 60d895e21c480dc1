"""``flowspec plan``: how a model would be spread over boards, and what that should bring. Loads nothing to serve."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from flowspec_edge.cli.layout import fitted, terminal_width
from flowspec_edge.cli.node_settings import OriginArguments, origin_settings
from flowspec_edge.cli.options import (
    BUNDLE_HELP,
    Commands,
    SearchArguments,
    access_from,
    add_network,
    add_search,
    search,
    set_command,
)
from flowspec_edge.cli.show_search import SearchDisplay
from flowspec_edge.config import ROW_KINDS, RowKind
from flowspec_edge.core.speculation.schedules import SCHEDULES
from flowspec_edge.errors import RequestError

if TYPE_CHECKING:
    from flowspec_edge.core.planning.placement import Plan
    from flowspec_edge.origin.planning import PlanOptions

MAX_WAIT_S = 86400
"""A day; who waits longer does not wait."""
EPILOG = """\
examples:
  flowspec plan                            the demo model on the boards found
  flowspec plan ./tinyllama-w8a8           another bundle
  flowspec plan --testbed unequal          boards that are only described (see flowspec bench --help)
  flowspec plan --standby                  and who would take over whose layers
  flowspec plan --testbed mine.toml --json

Each node measures once what a layer of such a model takes it, and keeps that. Links are measured with at most 1 MB \
per pair
of nodes, and again after a day. USED counts weights, caches for --context tokens and the runtime.
"""


@dataclass(frozen=True, kw_only=True)
class ContextArguments:
    """What every plan depends on beside the boards."""

    any_precision: bool
    context: int | None
    hidden_rows: RowKind


@dataclass(frozen=True, kw_only=True)
class RingArguments(SearchArguments, ContextArguments):
    """Of commands that open a ring over the nodes found."""

    equal_split: bool
    rebalance: bool
    wait_for_boards: float


@dataclass(frozen=True, kw_only=True)
class PlanCommand(OriginArguments, ContextArguments):
    testbed: str | None
    schedule: str
    standby: bool
    json: bool


def add_plan(commands: Commands) -> None:
    plan = commands.add_parser(
        "plan",
        help="show who would serve which layers, what that should bring, and who is left out and why",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan.add_argument("bundle", nargs="?", type=Path, metavar="BUNDLE", help=BUNDLE_HELP)
    plan.add_argument("--testbed", metavar="NAME", help="plan for the boards of a testbed instead of those found")
    plan.add_argument("--schedule", default="flowspec", help=f"one of {', '.join(SCHEDULES)} (default: flowspec)")
    _add_context(plan)
    plan.add_argument(
        "--standby", action="store_true", help="show who would stand by for whom with flowspec serve --standby"
    )
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    add_network(plan)
    add_search(plan)
    set_command(plan, PlanCommand, _plan)


def add_ring_options(parser: argparse.ArgumentParser) -> None:
    """What commands that open a ring let the user choose of its plan; see :class:`RingArguments`."""
    _add_context(parser)
    parser.add_argument(
        "--equal-split",
        action="store_true",
        help="equal shares for all nodes found, instead of what flowspec plan shows",
    )
    parser.add_argument(
        "--rebalance",
        action="store_true",
        help="where a board that comes later makes a better plan, move to it at once, texts under way included; "
        "without this flowspec serve does so when no text is under way",
    )
    parser.add_argument(
        "--wait-for-boards",
        type=float,
        default=60.0,
        metavar="S",
        help="where boards were lost and the others are too small for all layers, wait this long for one to come; 0: "
        "do not wait (default: %(default)g)",
    )


def _add_context(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--any-precision",
        action="store_true",
        help="let the plan choose, for each device, the quickest of the bundle's precisions that has room there; the "
        "text then depends on the plan (default: each device's own choice)",
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens of a session to leave memory for in the plan (default: all that the model allows)",
    )
    parser.add_argument(
        "--hidden-rows",
        choices=ROW_KINDS,
        default="float32",
        help="how hidden rows travel between boards (default: float32); in 16 bits they take half the bytes, for slow "
        "networks, and are rounded at each hop: texts may be others, and depend on where the layers are cut",
    )


def ring_plan_options(options: RingArguments, schedule: str) -> PlanOptions:
    """What a ring is planned for.

    Raises:
        RequestError: a number is out of range, or the schedule is not known.
    """
    _check_context(options)
    if not 0 <= options.wait_for_boards <= MAX_WAIT_S:
        raise RequestError(f"--wait-for-boards is {options.wait_for_boards}; it must lie between 0 and {MAX_WAIT_S} s")
    return replace(plan_options_from(options, schedule), is_equal_split=options.equal_split)


def plan_options_from(options: ContextArguments, schedule: str) -> PlanOptions:
    """What a plan is made for; on a terminal it tells there of what takes long.

    Raises:
        RequestError: a number is out of range, or the schedule is not known.
    """
    from flowspec_edge.core.speculation.schedules import find_schedule
    from flowspec_edge.origin.planning import PlanOptions

    _check_context(options)
    find_schedule(schedule)
    wanted = PlanOptions(schedule=schedule, num_tokens=options.context, is_any_precision=options.any_precision)
    if not sys.stderr.isatty():
        return wanted
    return replace(wanted, report=lambda line: print(line, file=sys.stderr, flush=True))


def _check_context(options: ContextArguments) -> None:
    if options.context is not None and options.context < 1:
        raise RequestError(f"--context is {options.context}; it must be at least 1")


async def _plan(options: PlanCommand) -> int:
    if options.testbed is not None:
        return run_testbed_plan(options.testbed, options.schedule, has_standbys=options.standby, is_json=options.json)
    with SearchDisplay(options.cluster, is_quiet=options.json) as display:
        from flowspec_edge.node.node import Node
        from flowspec_edge.origin.opening import plan_layers

        access = access_from(options)
        settings = replace(origin_settings(options, access), row_kind=options.hidden_rows)
        plan_options = replace(plan_options_from(options, options.schedule), has_standbys=options.standby)
        found = await search(options, access, display=display)
    node = await Node.start(settings)
    try:
        plan = await plan_layers(node, settings.bundles[0], found, plan_options)
    finally:
        await node.close()
    show_plan(plan, settings.bundles[0].manifest.drafts, is_json=options.json)
    return 0


def run_testbed_plan(name: str, schedule: str, *, has_standbys: bool = False, is_json: bool) -> int:
    """Plan for described boards and print it. Returns an exit status.

    Raises:
        TestbedError: there is no such testbed.
        PlacementError: its boards' memory is too small.
    """
    from flowspec_edge.bench.planned import plan_testbed
    from flowspec_edge.bench.testbed import load_testbed

    show_plan(plan_testbed(load_testbed(name), schedule, has_standbys=has_standbys), is_json=is_json)
    return 0


def show_plan(plan: Plan, drafts: str | None = None, *, is_json: bool) -> None:
    """Print the plan, and where drafts would come from, which a testbed does not tell."""
    from flowspec_edge.cli.show_plan import format_plan, plan_report

    if is_json:
        print(json.dumps({**plan_report(plan), "drafts": drafts}))
        return
    drafted = [] if drafts is None else [f"drafts: {drafts}"]
    print(fitted("\n".join([format_plan(plan), *drafted]), terminal_width()))
