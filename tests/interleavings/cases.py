"""What befalls a cluster while it writes, and how a case is judged.

Real links lose, delay and end messages, and neither repeat nor reorder any: TCP sees to that, and every ring has
connections of its own. Across links, and across rings, everything is reordered here. Single messages that are lost,
repeated or swapped are what a broken peer would send; there, too, a text may not become another one.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from dataclasses import dataclass

from flowspec_edge.config import GenerateOptions
from flowspec_edge.core.planning.losses import FAILED_S, TRY_S, way_between
from flowspec_edge.core.planning.recovery import MAX_LOSSES
from tests.interleavings.cluster import Cluster, Text
from tests.interleavings.failing_ring import ORIGIN_NAME, FailingRing
from tests.interleavings.order import DROP, REPEAT, REPEAT_LATER, SWAP, Order

MAX_STEPS = 150_000
MAX_TIME_S = 900.0
"""Far longer than MAX_LOSSES silent rings, each of which is given up after PROGRESS_TIMEOUT_S."""
SLACK_S = FAILED_S + TRY_S + 5.0
"""Where enough boards have answered for so long, no text may end for want of boards."""
HOLDS_S = (0.02, 0.3, 1.0, 3.0)

FAULTS = (
    "link lost",
    "link lost, one end sees it",
    "link swallows",
    "messages delayed",
    "board killed",
    "board without power",
    "board restarted",
    "board frozen",
    "board thawed",
    "board back",
    "board new",
    "stage fails",
    "packets lost",
    "client leaves",
    DROP,
    REPEAT,
    REPEAT_LATER,
    SWAP,
)
ON_A_RING = {
    *("link lost", "link lost, one end sees it", "link swallows", "messages delayed", "stage fails", "packets lost"),
    *(DROP, REPEAT, REPEAT_LATER, SWAP),
}
"""These wait until there is a ring to strike."""
TRICKS = {DROP, REPEAT, REPEAT_LATER, SWAP}
SILENCING = {"link swallows", "link lost, one end sees it", DROP, SWAP}
"""Without these no ring falls silent: what is lost is seen."""


@dataclass(frozen=True, slots=True)
class Fault:
    """``kind`` strikes after so many steps; ``which`` chooses whom, and ``detail`` how."""

    after: int
    kind: str
    which: int
    detail: int


@dataclass(frozen=True, slots=True)
class Request:
    """A text that is asked for after so many steps."""

    after: int
    prompt: tuple[int, ...]
    options: GenerateOptions


@dataclass(frozen=True, slots=True)
class Case:
    """Everything that decides what happens: equal cases end equally."""

    seed: int
    num_boards: int
    num_needed: int
    requests: tuple[Request, ...]
    faults: tuple[Fault, ...]
    skill: float = 0.7
    taps: tuple[int, ...] = ()
    pace_s: float = 0.01
    is_strict: bool = False
    moves_at_once: bool = True
    wait_s: float = 10.0
    max_context: int = 512


def play(case: Case) -> Counter[str]:
    """Let it happen. Returns how often what was met.

    Raises:
        AssertionError: a text became another one, hangs, or ended without need; or something is left behind.
    """
    rng = random.Random(case.seed)
    order = Order(rng, pace_s=case.pace_s, is_strict=case.is_strict)
    build = functools.partial(FailingRing, max_context=case.max_context, skill=case.skill, taps=case.taps)
    cluster = Cluster(
        order,
        rng,
        build,
        num_boards=case.num_boards,
        num_needed=case.num_needed,
        wait_s=case.wait_s,
        at_once=case.moves_at_once,
        max_context=case.max_context,
    )
    requests, faults = sorted(case.requests, key=lambda request: request.after), list(case.faults)
    late_s = order.now_s + MAX_TIME_S
    strikes_at, step = faults[0].after if faults else 0, 0
    while requests or any(text.end is None for text in cluster.texts):
        while requests and requests[0].after <= step:
            request = requests.pop(0)
            cluster.submit(request.prompt, request.options)
            late_s = order.now_s + MAX_TIME_S
        if faults and step >= strikes_at and (faults[0].kind not in ON_A_RING or cluster.has_open_ring):
            cluster.tally[strike(cluster, faults.pop(0))] += 1
            strikes_at = step + faults[0].after if faults else 0
        assert order.step(), f"at rest, while texts wait: {cluster.texts}"
        step += 1
        assert step < MAX_STEPS and (order.now_s < late_s or requests), f"texts hang: {cluster.texts}"
        for text in cluster.texts:
            judge(cluster, text)
        if step % 256 == 0 and cluster.ring is not None:
            cluster.ring.check()
    _let_rest(cluster)
    fell_silent = any("nothing came back" in cause for cause in cluster.causes)
    assert not fell_silent or SILENCING & cluster.tally.keys(), f"a ring fell silent: {cluster.causes}"
    cluster.tally.update(cluster.order.played)
    cluster.tally["steps"] += step
    for text in cluster.texts:
        cluster.tally[f"text: {text.end}"] += 1
        cluster.tally[f"rings of a text: {min(text.num_rings, 4)}"] += 1
    return cluster.tally


def judge(cluster: Cluster, text: Text) -> None:
    """What a client has is the beginning of the undisturbed text; and no text ends before it must."""
    if text.is_judged:
        return
    expected = text.expected
    if text.end is None:
        assert text.tokens == expected[: len(text.tokens)], "another text"
        return
    text.is_judged = True
    if text.end in ("stop", "length"):
        assert text.tokens == expected, f"another text, or not all of it: {text.tokens}, where {expected} is right"
        return
    assert text.tokens == expected[: len(text.tokens)], "another text"
    if text.end == "refused":
        assert len(text.prompt) >= cluster.max_context, text.error
    if text.end == "failed":
        assert text.error, "an end without a reason"
        if "rings in a row" in text.error:
            cluster.tally["given up: rings in a row"] += 1
            assert text.num_losses >= MAX_LOSSES, f"given up after {text.num_losses} losses: {text.error}"
            assert cluster.num_strikes >= MAX_LOSSES, f"given up after {cluster.num_strikes} faults: {text.error}"
        else:
            cluster.tally["given up: no room"] += 1
            waited_s = cluster.order.now_s - (text.missing_since or 0.0)
            assert waited_s >= text.recovery.wait_s or "no board came" not in text.error, f"{waited_s} s: {text.error}"
            is_hasty = text.recovery.wait_s < SLACK_S
            assert is_hasty or not cluster.has_had_enough(SLACK_S), (
                f"given up, though enough boards are there: {text.error}"
            )


def _let_rest(cluster: Cluster) -> None:
    """Nobody asks any more: an idle ring keeps no session, and a closed one nothing at all."""
    has_credits = not TRICKS & cluster.tally.keys()
    now_s = cluster.order.now_s
    while cluster.order.now_s < now_s + 0.5 and cluster.order.step():
        pass
    cluster.close()
    num_steps = 0
    while cluster.order.step():
        num_steps += 1
        assert num_steps < MAX_STEPS, "the cluster does not come to rest"
    for ring in cluster.rings:
        ring.check_rest(has_credits=has_credits)
        ring.check_closed()


def strike(cluster: Cluster, fault: Fault) -> str:
    """Returns what happened; a fault that finds nothing to strike does nothing."""
    which, detail = fault.which, fault.detail
    boards = list(cluster.boards.values())
    board = boards[which % len(boards)]
    ring = cluster.ring
    cluster.num_strikes += 1
    match fault.kind:
        case "board killed" if board.is_up:
            cluster.stop(board, is_seen=True, is_reset=bool(detail % 2))
        case "board without power" if board.is_up:
            cluster.stop(board, is_seen=False, is_reset=True)
        case "board restarted" if board.is_up:
            cluster.stop(board, is_seen=True, is_reset=bool(detail % 2))
            cluster.start(board)
        case "board frozen" if board.answers:
            cluster.freeze(board)
        case "board thawed" if board.is_frozen:
            cluster.thaw(board)
        case "board back" if not board.is_up:
            cluster.start(board)
        case "board new" if len(boards) < 6:
            cluster.add_board()
        case "client leaves" if cluster.texts:
            cluster.cancel(cluster.texts[which % len(cluster.texts)])
        case kind if ring is not None:
            return _strike_ring(cluster, ring, kind, which, detail)
        case _:
            return "nothing to strike"
    return fault.kind


def _strike_ring(cluster: Cluster, ring: FailingRing, kind: str, which: int, detail: int) -> str:
    num = len(ring.boards)
    links = [*(f"control {i}" for i in range(num)), *(f"hop {i}" for i in range(num + 1))]
    lanes = [*links, *(f"reply {i}" for i in range(num)), *(f"credit {i}" for i in range(num + 1))]
    link, lane = links[which % len(links)], ring.links.lane(lanes[which % len(lanes)])
    match kind:
        case "link lost":
            ring.lose_link(link, seen_by_far=True, seen_by_near=True, is_reset=bool(detail % 2))
        case "link lost, one end sees it":
            ring.lose_link(link, seen_by_far=detail % 2 == 0, seen_by_near=detail % 2 == 1, is_reset=bool(detail % 4))
        case "link swallows":
            ring.lose_link(link, seen_by_far=False, seen_by_near=False, is_reset=True)
        case "messages delayed":
            cluster.order.hold(lane, cluster.order.now_s + HOLDS_S[detail % len(HOLDS_S)])
        case "stage fails":
            ring.fail_stage(which % num, "out of memory")
        case "packets lost":
            node = ring.boards[which % num]
            ahead = [*ring.boards, ORIGIN_NAME][which % num + 1]
            cluster.lose_packets(node if detail % 2 else way_between(node, ahead))
        case _ if kind in TRICKS:
            cluster.order.meddle(lane, kind)
        case _:
            return "nothing to strike"
    return kind
