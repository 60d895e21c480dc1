"""The rows that graphs are compared on: a chain in two chunks, a branching tree, and a single row with padding."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from exporter.config import LayerShape
from flowspec_edge.core.limits import RECENT_ROWS
from flowspec_edge.engine.attention_inputs import attention_inputs
from flowspec_edge.engine.padding import attention_padding
from flowspec_edge.manifest import (
    ATTENTION_BIAS,
    ATTENTION_PADDING,
    FEATURE,
    POSITION_IDS,
    ROTARY_COS,
    ROTARY_SIN,
    SEQLENS_K,
    TOTAL_LENGTH,
    of_sliding_layers,
)

# Added to a score that must not count: exp(MASKED + score) is exactly 0 in float32 for any score below 1e8.
MASKED = -1e9

NUM_CHAIN_ROWS = 64
# Parent of each tree row, counted from the tree's first row; -1 is the last row of the chain.
TREE_PARENTS = (-1, 0, 0, 0, 1, 1, 2, 4, 4, 6, 7, 9)
SINGLE_PARENT = 10

TEXT_ROWS = 512
"""Rows of a chunk of a text: many, since a matrix of a GGUF file is unpacked for each chunk."""

# Any text would do; code is what the demo model knows, and every tokenizer has tokens for it.
PROBE_TEXT = '''\
class Inventory:
    """Counts things by name, and says what is running low."""

    def __init__(self, limits):
        self.limits = dict(limits)
        self.counts = {}

    def add(self, name, number=1):
        if number < 0:
            raise ValueError("number must not be negative: %r" % number)
        self.counts[name] = self.counts.get(name, 0) + number
        return self.counts[name]

    def low(self):
        for name, limit in sorted(self.limits.items()):
            if self.counts.get(name, 0) < limit:
                yield name
'''

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Step:
    """One forward: a chunk of rows, of which those from ``num_compared`` on are padding.

    Rows are numbered from the first step on. ``parents`` has that of each row up to the last one of the chunk and of
    ``num_fused_padding`` rows behind it, which the fused operator needs; -1 is the parent of the very first row.
    """

    tokens: np.ndarray  # int64 [rows]
    parents: list[int]
    num_compared: int
    num_fused_padding: int

    @property
    def first(self) -> int:
        """The number of the chunk's first row."""
        return len(self.parents) - self.num_fused_padding - self.num_compared

    @property
    def num_slots(self) -> int:
        """Slots in use after this step, padding included; slot 0 of a drafter's cache is one of them."""
        return max(len(self.parents), self.first + len(self.tokens)) + 1

    def path(self, row: int) -> list[int]:
        """The ancestors of a row and the row itself, in order of depth; a row of padding is its only one."""
        path = [row]
        while row < len(self.parents) and self.parents[path[-1]] >= 0:
            path.append(self.parents[path[-1]])
        return path[::-1]

    @cached_property
    def seen(self) -> np.ndarray:
        """Which rows each row of the chunk attends to: its ancestors and itself, bool [rows, rows so far]."""
        stop = self.first + len(self.tokens)
        seen = np.zeros((len(self.tokens), stop), bool)
        for number, row in enumerate(range(self.first, stop)):
            parent = self.parents[row] if row < len(self.parents) else -1
            if parent >= self.first:
                seen[number] = seen[parent - self.first]
            elif parent >= 0:
                seen[number, self.path(parent)] = True
            seen[number, row] = True
        return seen

    def parents_of_rows(self) -> np.ndarray:
        """The parent of each row of the chunk, int64 [rows]."""
        rows = range(self.first, self.first + len(self.tokens))
        return np.array([self.parents[row] if row < len(self.parents) else row for row in rows])

    def inputs(self, shape: LayerShape, num_slots: int) -> Arrays:
        """The inputs of a layer block with a cache of ``num_slots``: row ``r`` is in slot ``r``."""
        paths = [self.path(row) for row in range(self.first, self.first + len(self.tokens))]
        recent = np.array([([path[-1]] * RECENT_ROWS + path)[-RECENT_ROWS:] for path in paths])
        positions = np.array([len(path) - 1 for path in paths])
        return attention_inputs(self.first, positions, recent, shape, num_slots=num_slots)

    def fused_inputs(self, shift: int) -> Arrays:
        """The inputs of a graph with the fused operator: row ``r`` is in slot ``r + 1``, ``shift`` positions early."""
        bias = ancestor_bias(self.parents, self.first, len(self.parents))
        num_rows, total = bias.shape[2:]
        positions = np.array([len(self.path(row)) - 1 - shift for row in range(self.first, len(self.parents))])
        return {
            ATTENTION_PADDING: np.array([0, num_rows - len(self.tokens)]),
            ATTENTION_BIAS: bias,
            POSITION_IDS: np.maximum(positions, 0)[None],
            SEQLENS_K: np.array([total - 1], dtype=np.int32),
            TOTAL_LENGTH: np.array(total, dtype=np.int32),
        }


def probe_steps(token_ids: Sequence[int], max_context: int, min_rows: int) -> list[Step]:
    """The rows that every graph is compared on, in chunks of at least ``min_rows``.

    ``token_ids`` are repeated where they are too few.
    """
    deepest = 1 + max(_depth(row) for row in range(len(TREE_PARENTS))) + 1
    num_chain = min(NUM_CHAIN_ROWS, max(max_context - deepest, 2))
    parents = [*range(-1, num_chain - 1), *(num_chain + parent for parent in TREE_PARENTS)]
    parents.append(num_chain + SINGLE_PARENT)
    cuts = [0, num_chain * 5 // 8, num_chain, len(parents) - 1, len(parents)]
    return [_step(token_ids, parents, start, stop, min_rows) for start, stop in itertools.pairwise(cuts)]


def text_steps(texts: Iterable[Sequence[int]]) -> list[Step]:
    """Texts in chunks of TEXT_ROWS, one after the other.

    Each begins anew: what an earlier one has left in a cache is no row's ancestor. A last chunk of one row gets no
    padding for the matrix products.
    """
    steps = []
    for token_ids in texts:
        parents = list(range(-1, len(token_ids) - 1))
        for start in range(0, len(token_ids), TEXT_ROWS):
            steps.append(_step(token_ids, parents, start, min(start + TEXT_ROWS, len(parents)), min_rows=1))
    return steps


def ancestor_bias(parents: Sequence[int], start: int, stop: int) -> np.ndarray:
    """Bias of the rows ``[start, stop)``: 0 for a row and its ancestors, else MASKED.

    Row ``r`` is in slot ``r + 1``.
    """
    bias = np.full((1, 1, stop - start, stop + 1), MASKED, dtype=np.float32)  # [1, 1, rows, total]
    for row in range(start, stop):
        ancestor = row
        while ancestor >= 0:
            bias[0, 0, row - start, ancestor + 1] = 0.0
            ancestor = parents[ancestor]
    return bias


def step_inputs(
    step: Step, rows: Mapping[str, np.ndarray], shape: LayerShape, num_slots: int, *, is_fused: bool
) -> Arrays:
    """The inputs of a graph beside its rows and caches. A drafter's rows are at the positions of their parents."""
    return step.fused_inputs(shift=int(FEATURE in rows)) if is_fused else step.inputs(shape, num_slots)


def rotary_inputs(shape: LayerShape, num_positions: int) -> Arrays:
    """Cosines and sines by position: two float32 tables [num_positions, head_dim / 2], or four where some layers have a
    window.
    """

    def tables(frequencies: Sequence[float]) -> Arrays:
        angles = np.outer(np.arange(num_positions, dtype=np.float32), np.array(frequencies, np.float32))
        return {ROTARY_COS: np.cos(angles), ROTARY_SIN: np.sin(angles)}

    full, *sliding = shape.ropes
    return tables(full) | {of_sliding_layers(name): table for rope in sliding for name, table in tables(rope).items()}


def _step(token_ids: Sequence[int], parents: Sequence[int], start: int, stop: int, min_rows: int) -> Step:
    """The rows ``[start, stop)``, padded as the engine pads them: each row of padding is a child of the row before it
    for the fused operator, and by itself in a block.
    """
    num_padding = attention_padding(stop - start, stop + 1)
    rows = range(start, max(stop, start + min_rows))
    return Step(
        tokens=np.array([token_ids[row % len(token_ids)] for row in rows], dtype=np.int64),
        parents=[*parents[:stop], *range(stop - 1, stop - 1 + num_padding)],
        num_compared=stop - start,
        num_fused_padding=num_padding,
    )


def _depth(row: int) -> int:
    """How many rows of the probe tree are above this one."""
    parent = TREE_PARENTS[row]
    return 0 if parent < 0 else 1 + _depth(parent)
