"""What a layer block is told of a forward's rows: where each is written, and which rows of the cache it attends to.

A row attends to its older ancestors, all but the last ``RECENT_ROWS`` of its path, by one product over the cache, where
they are in the order of their positions; and to its recent ones by a product over rows that are gathered in the order
of depth. Both are the same in a tree and in a chain (docs/design.md, "The same bits in every tree").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flowspec_edge.core.limits import GROUP_ROWS, RECENT_ROWS
from flowspec_edge.manifest import (
    ATTENTION_PADDING,
    CACHE_SLOTS,
    OLDER_BIAS,
    OLDER_MASK,
    POSITION_IDS,
    RECENT_BIAS,
    RECENT_SLOTS,
    of_sliding_layers,
)

MASKED = np.float32(-10000.0)
"""Added to the score of a row that may not be seen. It is far below any other one's."""
MIN_PRODUCTS = 3
"""Products that a layer's older ancestors take at least, where its heads allow it: boards have four cores, and a
product that several threads share may be cut so that its sums are taken in another order. But each product begins with
a copy of what it reads of the cache: with three of them instead of nine, a row of SmolLM2-135M after 512 others takes a
tenth less time (x86, one thread).
"""


@dataclass(frozen=True)
class HeadGroups:
    """How the heads of a layer share products with the cache: ``num_products``, each of ``num_heads`` heads."""

    num_products: int
    num_heads: int

    @classmethod
    def of(cls, num_heads: int, num_kv_heads: int) -> HeadGroups:
        """Each key-value head has one product, or several where that would be less than MIN_PRODUCTS of them. A single
        key-value head has one, since ONNX Runtime would make one of several.
        """
        group = num_heads // num_kv_heads
        if num_kv_heads == 1:
            return cls(1, group)
        parts = [n for n in range(1, group + 1) if group % n == 0 and (n * num_kv_heads >= MIN_PRODUCTS or n == group)]
        return cls(parts[0] * num_kv_heads, group // parts[0])


class Heads(Protocol):
    """Of a model: how many heads its layers have, and how many rows those with a window see, if there are any."""

    @property
    def num_heads(self) -> int: ...

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def window(self) -> int | None: ...


def attention_inputs(
    first_slot: int,
    positions: NDArray[np.int64],
    recent: NDArray[np.int64],
    heads: Heads,
    *,
    num_slots: int,
) -> dict[str, NDArray[np.generic]]:
    """The inputs of a layer block for rows that take the slots from ``first_slot`` on, of a cache of ``num_slots``.

    ``positions`` is [rows]. ``recent`` is [rows, RECENT_ROWS]: the slots of each row's last ancestors in order of
    depth, its own being the last; where a row has fewer ancestors, the first ones may be any slots.
    """
    num_rows = len(positions)
    num_groups, group_rows = _groups(num_rows, HeadGroups.of(heads.num_heads, heads.num_kv_heads).num_heads)
    num_padding = num_groups * group_rows - num_rows
    lengths = positions + 1  # of each row's path
    if num_padding:
        recent = np.concatenate([recent, np.zeros((num_padding, RECENT_ROWS), np.int64)])
        lengths = np.concatenate([lengths, np.full(num_padding, RECENT_ROWS)])
    lengths = lengths.reshape(num_groups, 1, 1, group_rows, 1, 1)
    slots = np.zeros((heads.num_kv_heads, num_rows, 3), np.int64)
    slots[:, :, 0] = np.arange(heads.num_kv_heads)[:, None]
    slots[:, :, 2] = np.arange(first_slot, first_slot + num_rows)
    inputs: dict[str, NDArray[np.generic]] = {
        ATTENTION_PADDING: np.array([0, num_padding]),
        POSITION_IDS: positions[None],
        CACHE_SLOTS: slots,
        RECENT_SLOTS: recent.reshape(num_groups, group_rows, RECENT_ROWS),
        **_masks(lengths, num_slots),
    }
    if heads.window is not None:
        masks = _masks(lengths, num_slots, heads.window)
        inputs |= {of_sliding_layers(name): mask for name, mask in masks.items()}
    return inputs


def _masks(lengths: NDArray[np.int64], num_slots: int, window: int | None = None) -> dict[str, NDArray[np.generic]]:
    """What says of slots and of recent ancestors whether a row sees them: all of its path, or the last ``window``.

    ``lengths`` are those of the rows' paths, [groups, 1, 1, group_rows, 1, 1].
    """
    num_recent = lengths if window is None else np.minimum(lengths, window)
    is_absent = np.arange(RECENT_ROWS) < RECENT_ROWS - num_recent  # [groups, 1, 1, group_rows, 1, recent]
    is_older = np.arange(RECENT_ROWS, num_slots + RECENT_ROWS) < lengths  # [groups, 1, 1, group_rows, 1, slots]
    if window is not None:
        is_older &= np.arange(num_slots) >= lengths - window
    return {
        OLDER_BIAS: np.where(is_older, np.float32(0.0), MASKED),
        OLDER_MASK: is_older.astype(np.float32),
        RECENT_BIAS: is_absent * MASKED,
    }


def _groups(num_rows: int, num_heads: int) -> tuple[int, int]:
    """How many groups, of how many rows each: as even as can be, and never one row with one head.

    ONNX Runtime multiplies a single row by other code, with other bits.
    """
    num_groups = -(-num_rows // GROUP_ROWS)
    group_rows = -(-num_rows // num_groups)
    return num_groups, max(group_rows, 2 if num_heads == 1 else 1)
