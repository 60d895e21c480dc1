"""Compares random draft trees with plain chains: each row must have the same bits, whatever lies around it.

Chunks of 1 to 64 rows, Advances that come late or early, and forwards that are given up go through the core of a stage
and its layers. Then each row is run by itself, after its own path alone.

    python row_bits.py BUNDLE

prints as JSON, by precision and number of threads, how many rows were compared, how many differ, and whether the device
must run each row by itself for that. It runs on a board where only flowspec-edge is installed.
"""

import functools
import itertools
import json
import random
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from flowspec_edge.core import events as ev
from flowspec_edge.core.limits import RECENT_ROWS
from flowspec_edge.core.rows import NO_PARENT, Advance, Chunk, Row, SessionSpec
from flowspec_edge.core.speculation.kv_slots import KvSlots
from flowspec_edge.core.speculation.stage import Stage
from flowspec_edge.core.speculation.tree import Tree
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.manifest import load_manifest

IN_TREE, ALONE = 1, 2
"""The two sessions."""
CAPACITY = 4096
MAX_CHUNK = 64


class RandomOrigin:
    """Chunks and Advances of one text, of tokens below ``vocab_size``."""

    def __init__(self, rng: random.Random, vocab_size: int, num_prompt: int, num_chunks: int) -> None:
        self._rng, self._vocab_size = rng, vocab_size
        self.rows: list[Row] = []  # all that ever were, parents before children
        self.chunks: deque[tuple[Row, ...]] = deque()
        self.advances: deque[Advance] = deque()
        self._tree = Tree()
        for _ in range(num_prompt):
            self._add(self.rows[-1].id if self.rows else NO_PARENT)
        rest = list(self.rows)
        while rest:
            size = rng.randint(1, MAX_CHUNK)
            self.chunks.append(tuple(rest[:size]))
            del rest[:size]
        self._root = self.rows[-1].id
        for _ in range(num_chunks):
            self._send()
            for _ in range(rng.choice([0, 0, 1, 3, 9])):
                self._move_root()

    def _add(self, parent: int) -> bool:
        row = Row(len(self.rows), parent, self._rng.randrange(self._vocab_size))
        if not self._tree.add(row):
            return False
        self.rows.append(row)
        return True

    def _send(self) -> None:
        """Rows anywhere below the root: at one time mostly deep, at another mostly wide."""
        depth, first, depth_share = self._tree[self._root].depth, len(self.rows), self._rng.random()
        for _ in range(self._rng.randint(1, MAX_CHUNK)):
            below = [self._root, *(row.id for row in self._tree.descendants(self._root))]
            below = [id for id in below if self._tree[id].depth < depth + RECENT_ROWS - 1]
            parent = max(below) if self._rng.random() < depth_share else self._rng.choice(below)
            children = self._tree[parent].children
            if len(children) < 4:
                self._add(parent)
        if len(self.rows) > first:
            self.chunks.append(tuple(self.rows[first:]))

    def _move_root(self) -> None:
        children = self._tree[self._root].children
        if children:
            token, child = self._rng.choice(list(children.items()))
            self.advances.append(Advance(self._root, token))
            self._tree.advance(self.advances[-1])
            self._root = child


def run_in_tree(stage: StageRunner, origin: RandomOrigin, rng: random.Random) -> Iterator[tuple[int, np.ndarray]]:
    """The draft id and the hidden row of each row that was run to the end."""
    core = Stage(is_last=False, embeds=True)
    events: deque[ev.StageEvent] = deque([ev.SessionRequested(SessionSpec(IN_TREE, CAPACITY))])
    running: ev.RunForward | None = None
    is_cancelled = False
    num_credits = 2
    while events or running or origin.chunks or origin.advances:
        if not events and running and (rng.random() < 0.7 or not origin.advances):
            answers = iter([False] * rng.randrange(3) if is_cancelled else itertools.repeat(False))
            finished = stage.run(running, functools.partial(next, answers, True))
            if not is_cancelled:
                yield from ((row.id, hidden.copy()) for row, hidden in zip(running.rows, finished.hidden, strict=True))
            running, is_cancelled = None, False
            events.append(finished)
        elif not events and origin.advances and (rng.random() < 0.4 or not origin.chunks):
            events.append(ev.AdvanceArrived(IN_TREE, *origin.advances.popleft()))
        elif not events and num_credits and origin.chunks:
            num_credits -= 1
            rows = origin.chunks.popleft()
            events.append(ev.ChunkArrived(Chunk(IN_TREE, rows, len(rows))))
        while events:
            for action in core.handle(events.popleft(), 0.0):
                match action:
                    case ev.OpenCache(session, capacity):
                        stage.open_cache(session, capacity)
                    case ev.RunForward():
                        running = action
                    case ev.CancelForward():
                        is_cancelled = True
                    case ev.GrantCredit(num_chunks):
                        num_credits += num_chunks
                    case ev.SendChunk():
                        events.append(ev.CreditArrived(1))
    core.check()
    stage.free_cache(IN_TREE)


def run_alone(stage: StageRunner, rows: list[Row]) -> dict[int, np.ndarray]:
    """The hidden row of each row by its draft id, each run by itself while the cache has its path alone."""
    children: dict[int, list[Row]] = {}
    for row in rows:
        children.setdefault(row.parent, []).append(row)
    stage.open_cache(ALONE, CAPACITY)
    slots, found = KvSlots(CAPACITY), dict[int, np.ndarray]()
    path: list[int] = []
    pending = children[NO_PARENT]
    while pending:
        row = pending.pop()
        while path and path[-1] != row.parent:
            slots.drop([path.pop()])
        found[row.id] = stage.run(ev.RunForward(ALONE, (row,), None, slots.place([row]))).hidden[0].copy()
        path.append(row.id)
        pending += children.get(row.id, [])
    stage.free_cache(ALONE)
    return found


def compare(
    stage: StageRunner, vocab_size: int, seed: int, num_prompt: int = 90, num_chunks: int = 8
) -> tuple[int, int]:
    """How many rows were compared, and how many of them have other bits in a tree than by themselves."""
    rng = random.Random(seed)
    origin = RandomOrigin(rng, vocab_size, rng.randint(1, num_prompt), num_chunks)
    found = dict(run_in_tree(stage, origin, rng))
    expected = run_alone(stage, [row for row in origin.rows])
    return len(found), sum(not np.array_equal(hidden, expected[id]) for id, hidden in found.items())


def main() -> None:
    directory = Path(sys.argv[1])
    manifest = load_manifest(directory)
    report = {}
    for precision in manifest.precisions:
        for num_threads in (1, 2):
            stage = StageRunner(
                directory, manifest, 0, manifest.geometry.num_layers, num_threads=num_threads, precision=precision
            )
            compared, differing = compare(
                stage, manifest.geometry.vocab_size, seed=4 + num_threads, num_prompt=200, num_chunks=3
            )
            report[f"{precision}, {num_threads} threads"] = {
                "compared": compared,
                "differing": differing,
                "one_by_one": stage._is_row_by_row,
            }
    head = Head(directory, manifest)
    rows = np.random.default_rng(4).standard_normal((16, manifest.geometry.hidden_size), np.float32)
    alone = np.concatenate([head.logits(row[None]) for row in rows])
    differing = int((alone != head.logits(rows)).any(axis=1).sum())
    report[f"head in {manifest.precision}"] = {
        "compared": len(rows),
        "differing": differing,
        "one_by_one": head._is_row_by_row,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
