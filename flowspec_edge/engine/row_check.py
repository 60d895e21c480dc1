"""Checks that a block gives a row the same bits in every chunk on this device, with as many threads as it has.

All that losslessness needs of ONNX Runtime is that a product's row does not depend on the other rows. Where several
threads share a product with the cache, its sums are taken in another order for few rows than for many. So a stage runs
on no more threads than it has products (``HeadGroups``), and checks what is left.
"""

from __future__ import annotations

import numpy as np

from flowspec_edge.core.limits import GROUP_ROWS, RECENT_ROWS, SLOTS_PER_STEP
from flowspec_edge.engine.attention_inputs import attention_inputs
from flowspec_edge.engine.graphs import CachedGraph, HiddenRows, as_ort_value
from flowspec_edge.engine.padding import PADDED_ROWS
from flowspec_edge.engine.rotary import RotaryTables
from flowspec_edge.manifest import HIDDEN, Geometry

NUM_SLOTS = 8 * SLOTS_PER_STEP
NUM_PAST = NUM_SLOTS - 40
"""Older rows are in all of the cache, so that sums over it have several parts."""
NUM_ROWS, NUM_ALONE = GROUP_ROWS, 3
"""Rows of the chunk, as many as attention takes at once, and how many of them are run by themselves."""


def gives_rows_the_same_bits(block: CachedGraph, num_layers: int, geometry: Geometry, min_rows: int) -> bool:
    """Whether random rows have the same bits in one chunk and by themselves.

    Takes as long as a forward of 16 rows and three of one.
    """
    random = np.random.default_rng(0)
    size = geometry.num_kv_heads, 1, NUM_SLOTS, geometry.head_dim
    caches = []
    for _ in range(num_layers):
        values = np.ones((*size[:3], geometry.head_dim + 1), np.float32)
        values[..., :-1] = random.standard_normal(size, np.float32)
        caches += [as_ort_value(random.standard_normal(size, np.float32)), as_ort_value(values)]
    tables = RotaryTables(geometry.ropes).reach(NUM_SLOTS)
    tables.fill(np.array([NUM_SLOTS - 1]))
    binding = block.bind(caches, tables.inputs)
    rows = random.standard_normal((NUM_ROWS, geometry.hidden_size), np.float32)

    def run(first: int, stop: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        """The rows ``[first, stop)`` of a chain behind the past."""
        padded = max(stop, first + min_rows)
        slots = np.arange(NUM_PAST + first, NUM_PAST + padded)
        recent = slots[:, None] + np.arange(1 - RECENT_ROWS, 1)
        arrays = attention_inputs(int(slots[0]), slots, recent, geometry, num_slots=NUM_SLOTS)
        hidden = HiddenRows(rows[first:stop], min_rows)
        inputs = {name: as_ort_value(array) for name, array in arrays.items()}
        block.bind_step(binding, {**inputs, HIDDEN: hidden.source}, hidden.target)
        block.run_bound(binding)
        hidden.advance()
        return hidden.array[0, : stop - first].copy()

    together = run(0, NUM_ROWS)
    return all(np.array_equal(run(number, number + 1)[0], together[number]) for number in range(NUM_ALONE))


def least_rows(block: CachedGraph, num_layers: int, geometry: Geometry) -> int:
    """How many rows a chunk must have for these to have the same bits: one, where a row by itself has them. The block
    is asked once.
    """
    if block.min_rows is None:
        block.min_rows = 1 if gives_rows_the_same_bits(block, num_layers, geometry, 1) else PADDED_ROWS
    return block.min_rows
