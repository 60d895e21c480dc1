"""Checks that a block gives a row the same bits in every chunk on this device, with as many threads as it has.

All that losslessness needs of ONNX Runtime is that a product's row does not depend on the other rows. Where several
threads share a product with the cache, its sums are taken in another order for few rows than for many. So a stage runs
on no more threads than it has products (``HeadGroups``), and checks what is left.
"""

from __future__ import annotations

import itertools

import numpy as np

from flowspec_edge.core.limits import GROUP_ROWS, RECENT_ROWS, SLOTS_PER_STEP
from flowspec_edge.engine.attention_inputs import attention_inputs
from flowspec_edge.engine.graphs import CachedGraph, HiddenRows, as_ort_value
from flowspec_edge.engine.padding import ROW_MULTIPLES, padded
from flowspec_edge.engine.rotary import RotaryTables
from flowspec_edge.manifest import HIDDEN, Geometry

NUM_SLOTS = 8 * SLOTS_PER_STEP
NUM_PAST = NUM_SLOTS - 40
"""Older rows are in all of the cache, so that sums over it have several parts."""
CUTS = 0, 1, 5, 8, GROUP_ROWS
"""Where a chunk of as many rows as attention takes at once is cut: chunks of 1, 4, 3 and 8 tell how many rows a product
takes at once, since they leave others over.
"""


def row_multiple(block: CachedGraph, num_layers: int, geometry: Geometry) -> int:
    """The least number of which chunks must have a multiple of rows for these to have the same bits in all of them; 0
    where there is none. The block is asked once.
    """
    if block.row_multiple is None:
        multiples = (one for one in ROW_MULTIPLES if gives_rows_the_same_bits(block, num_layers, geometry, one))
        block.row_multiple = next(multiples, 0)
    return block.row_multiple


def gives_rows_the_same_bits(block: CachedGraph, num_layers: int, geometry: Geometry, multiple: int) -> bool:
    """Whether random rows have the same bits in one chunk and in several, padded to that multiple.

    Takes as long as forwards of 16, 1, 4, 3 and 8 rows.
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
    rows = random.standard_normal((GROUP_ROWS, geometry.hidden_size), np.float32)

    def run(first: int, stop: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        """The rows ``[first, stop)`` of a chain behind the past."""
        num_rows = padded(stop - first, multiple)
        slots = NUM_PAST + first + np.arange(num_rows)
        recent = slots[:, None] + np.arange(1 - RECENT_ROWS, 1)
        arrays = attention_inputs(int(slots[0]), slots, recent, geometry, num_slots=NUM_SLOTS)
        hidden = HiddenRows(rows[first:stop], num_rows)
        inputs = {name: as_ort_value(array) for name, array in arrays.items()}
        block.bind_step(binding, {**inputs, HIDDEN: hidden.source}, hidden.target)
        block.run_bound(binding)
        hidden.advance()
        return hidden.array[0, : stop - first].copy()

    together = run(0, GROUP_ROWS)
    return all(np.array_equal(run(first, stop), together[first:stop]) for first, stop in itertools.pairwise(CUTS))
