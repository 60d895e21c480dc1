"""The cache of a draft head, and what its graph is told of a pass. Its attention is one fused operator.

New rows are written to the slots behind all those in use. Slot 0 is reserved, because the operator ignores position ids
while its past is empty.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from flowspec_edge.core.rows import Floats
from flowspec_edge.engine.attention_inputs import MASKED
from flowspec_edge.engine.graphs import as_ort_value
from flowspec_edge.engine.kv_cache import zeros_on_small_pages
from flowspec_edge.engine.padding import MAX_ATTENTION_PADDING, attention_padding
from flowspec_edge.manifest import ATTENTION_BIAS, ATTENTION_PADDING, POSITION_IDS, SEQLENS_K, TOTAL_LENGTH


class FusedCache:
    """Keys and values of some layers, in one array that the graphs update in place.

    The array has room for all slots of the session's limit, but takes memory only for pages that were written to. With
    huge pages, which NumPy asks for, the first row would take nearly all of it.
    """

    def __init__(self, num_layers: int, num_kv_heads: int, capacity: int, head_dim: int) -> None:
        # Rows of padding take slots behind those in use.
        shape = (2 * num_layers, 1, num_kv_heads, capacity + MAX_ATTENTION_PADDING, head_dim)
        self._stack: Floats = zeros_on_small_pages(shape)  # [2 layers, 1, kv_heads, capacity, head_dim]
        self.values = [as_ort_value(layer) for layer in self._stack]

    @property
    def num_slots(self) -> int:
        return int(self._stack.shape[3])

    @property
    def num_bytes(self) -> int:
        return self._stack.nbytes

    def copy(self, slots: Sequence[int]) -> Floats:
        """What is in these slots: [2 layers, 1, kv_heads, slots, head_dim]."""
        return self._stack[:, :, :, slots]

    def put(self, first: int, copied: Floats) -> None:
        """Write what was copied to the slots from ``first`` on."""
        self._stack[:, :, :, first : first + copied.shape[3]] = copied

    def gather(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy single slots. All sources are read before any target is written."""
        if sources:
            self._stack[:, :, :, targets] = self._stack[:, :, :, sources]


class StepInputs:
    """The inputs that each forward of a session needs besides its rows, with the padding that attention needs.

    ``numbers``, by the graphs' input names, are changed in place, so that a session binds them once.
    """

    def __init__(self, min_rows: int) -> None:
        self.min_rows = min_rows
        self._padding, self._last, self._total = np.zeros(2, np.int64), np.zeros(1, np.int32), np.zeros((), np.int32)
        self.numbers = {
            ATTENTION_PADDING: as_ort_value(self._padding),
            SEQLENS_K: as_ort_value(self._last),
            TOTAL_LENGTH: as_ort_value(self._total),
        }

    def set(self, mask: NDArray[np.bool_], positions: NDArray[np.int64]) -> dict[str, ort.OrtValue]:
        """Set the numbers for a forward, and return its further inputs, which are to be bound for this forward alone.

        ``mask`` [rows, total] says which slots a row sees, and ``positions`` are [rows].
        """
        rows, total = mask.shape
        num_padding = attention_padding(rows, total)
        if num_padding:  # a row of padding sees itself alone
            padded = np.zeros((rows + num_padding, total + num_padding), np.bool_)
            padded[:rows, :total] = mask
            padded[rows:, total:] = np.eye(num_padding, dtype=np.bool_)
            mask, total = padded, total + num_padding
            positions = np.concatenate([positions, np.zeros(num_padding, np.int64)])
        self._padding[1] = rows + num_padding - max(rows, self.min_rows)
        self._last[0], self._total[()] = total - 1, total
        bias = np.where(mask, np.float32(0.0), MASKED)
        return {ATTENTION_BIAS: as_ort_value(bias[None, None]), POSITION_IDS: as_ort_value(positions[None])}
