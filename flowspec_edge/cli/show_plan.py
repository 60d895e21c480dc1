"""What users see of a plan, and of how it held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flowspec_edge.cli.layout import table_lines
from flowspec_edge.core.planning.placement import Instead, Plan, Standby, mib

STAGE_COLUMNS = ("LAYERS", "PRECISION", "USED", "FREE", "STAGE")
KNOWN_BYTES = 2**49
"""A testbed that does not tell a board's memory is taken for more than this, which no board has."""
TREE_ROWS = 64
"""Of the draft tree by which a plan tells what drafts are expected to bring."""
SAME = 0.005
"""A share that rounds to no per cent."""


def plan_report(plan: Plan) -> dict[str, Any]:
    """The plan as a JSON object. Times are those of a chunk of ``chunk_rows``."""
    return {
        "schedule": plan.schedule,
        "tokens_per_s": round(plan.tokens_per_s, 3),
        "trip_ms": round(plan.trip_ms, 3),
        "interval_ms": round(plan.interval_ms, 3),
        "chunk_rows": plan.num_rows,
        "tokens_per_tree": round(_tree_tokens(plan), 3) if _drafts(plan) else None,
        "stages": [
            {
                "node": stage.node,
                "start": stage.start,
                "stop": stage.stop,
                "precision": stage.precision,
                "memory_bytes": stage.memory_bytes,
                "free_memory_bytes": stage.left_bytes if stage.left_bytes < KNOWN_BYTES else None,
                "stage_ms": round(stage.time.at(plan.num_rows), 3),
                "slowdown": round(stage.slowdown, 3),
            }
            for stage in plan.stages
        ],
        "one_board_alone": _instead(plan.alone),
        "one_more": _instead(plan.one_more),
        "sharing": [list(nodes) for nodes in plan.sharing],
        "left_out": [{"node": out.node, "reason": out.reason} for out in plan.left_out],
        "is_kept": plan.is_kept,
        "standbys": [_standby_report(standby) for standby in plan.standbys],
    }


def _standby_report(standby: Standby) -> dict[str, Any]:
    return {
        "if_lost": standby.node,
        "start": standby.start,
        "stop": standby.stop,
        "layers": [
            {
                "node": layers.node,
                "start": layers.start,
                "stop": layers.stop,
                "precision": layers.precision,
                "memory_bytes": layers.memory_bytes,
            }
            for layers in standby.layers
        ],
        "tokens_per_s": round(standby.plan.tokens_per_s, 3) if standby.plan is not None else None,
    }


def format_plan(plan: Plan) -> str:
    """A table of the ring, what it should bring, and what other choices would bring."""
    rows = [
        (
            stage.node,
            f"[{stage.start}, {stage.stop})",
            stage.precision,
            *(
                mib(num_bytes) if stage.left_bytes < KNOWN_BYTES else "-"
                for num_bytes in (stage.memory_bytes, stage.left_bytes)
            ),
            f"{stage.time.at(plan.num_rows):.1f} ms",
        )
        for stage in plan.stages
    ]
    lines = table_lines(("NODE", *STAGE_COLUMNS), rows, STAGE_COLUMNS)
    lines += ["", *_prediction_lines(plan), _alone_line(plan)]
    if plan.one_more is not None:
        lines.append(f"one more like {plan.one_more.node}: {plan.one_more.tokens_per_s:.2f} tokens/s")
    if plan.is_kept:
        lines.append("the layers stay where they were last: nothing else is clearly better")
    lines += [f"{', '.join(nodes)} share the cores of one machine, which count once" for nodes in plan.sharing]
    lines += [
        f"{stage.node} takes {stage.slowdown:.1f} times what it once measured: it is hot, kept under a cap, or "
        "busy with something else"
        for stage in plan.stages
        if stage.slowdown > 1
    ]
    lines += [f"left out: {out.node}: {out.reason}" for out in plan.left_out]
    return "\n".join([*lines, *_standby_lines(plan.standbys, max(24, *(len(stage.node) for stage in plan.stages)))])


def _prediction_lines(plan: Plan) -> list[str]:
    """What is predicted, and from what."""
    rows = f"{plan.num_rows} row{'s' if plan.num_rows > 1 else ''}"
    return [
        f"predicted: {plan.tokens_per_s:.2f} tokens/s with schedule {plan.schedule}",
        f"  a chunk of {rows} is back from its trip through all stages in {plan.trip_ms:.0f} ms;",
        f"  a chunk can leave every {plan.interval_ms:.0f} ms, as long as the slowest part takes for one",
        *(
            [f"  a tree of {TREE_ROWS} drafts is expected to bring {_tree_tokens(plan):.1f} tokens"]
            if _drafts(plan)
            else []
        ),
    ]


def _drafts(plan: Plan) -> bool:
    """Whether there are drafts in it."""
    return plan.acceptance.has_drafts and plan.schedule != "autoregressive"


def _tree_tokens(plan: Plan) -> float:
    return float(plan.acceptance.at(TREE_ROWS))


def _standby_lines(standbys: Sequence[Standby], width: int) -> list[str]:
    """A table of who has which layers beside its own, for the loss of each stage, and what the others bring then."""
    if not standbys:
        return []
    lines = ["", f"{'IF LOST':{width}} {'THEN':>12}  STANDS BY"]
    for standby in standbys:
        if standby.plan is None:
            lines.append(f"{standby.node:{width}} {'-':>12}  none of the others has room")
            continue
        then = f"{standby.plan.tokens_per_s:.2f} tok/s"
        for layers in standby.layers:
            size = f", {mib(layers.memory_bytes)}" if layers.memory_bytes else ""  # a testbed may not tell it
            holder = f"{layers.node} [{layers.start}, {layers.stop}){size}"
            lines.append(f"{standby.node if then else '':{width}} {then:>12}  {holder}")
            then = ""
    return lines


def _alone_line(plan: Plan) -> str:
    if plan.alone is None:
        return "one board alone: none has room for the whole model"
    line = f"one board alone: {plan.alone.tokens_per_s:.2f} tokens/s ({plan.alone.node})"
    if [stage.node for stage in plan.stages] == [plan.alone.node]:
        line += "; it is faster alone than any ring with the others" if plan.left_out else ""
    return line


def _instead(instead: Instead | None) -> dict[str, Any] | None:
    return None if instead is None else {"node": instead.node, "tokens_per_s": round(instead.tokens_per_s, 3)}


def format_outcome(report: dict[str, Any]) -> str:
    """How a prediction held, in one line; ``report`` is what ``Outcome.to_report`` gives."""
    predicted, difference = report["predicted_tokens_per_s"], report["difference"]
    how = "as many" if abs(difference) < SAME else f"{abs(difference):.0%} {'more' if difference > 0 else 'fewer'}"
    line = f"the plan predicted {predicted:.1f} tokens/s, and {how} came"
    return f"{line}: {report['cause']}" if report["cause"] else line
