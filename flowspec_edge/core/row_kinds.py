"""In which numbers hidden rows travel between boards: as they are computed, or rounded to 16 bits at each hop.

Stages, head and drafter compute in float32. A row is rounded by itself, where it leaves the stage that has computed it,
and is made float32 again where it is computed with. So in one ring a row has the same bits whatever the tree around it;
but a ring that is cut elsewhere rounds elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from flowspec_edge.config import RowKind
from flowspec_edge.core.rows import Floats, Hidden
from flowspec_edge.errors import RowsTooLargeError

WIRE_TYPES: Mapping[RowKind, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("V2"),  # numpy has no such numbers: these are the upper halves of float32
}
_KINDS: Mapping[np.dtype[Any], RowKind] = {
    dtype.newbyteorder(order): kind for kind, dtype in WIRE_TYPES.items() for order in ("<", ">")
}
_U16, _U32 = np.dtype("<u2"), np.dtype("<u4")


def kind_of(hidden: Hidden) -> RowKind:
    """The kind of rows that are to travel, or have."""
    return _KINDS[hidden.dtype]


def value_bytes(kind: RowKind) -> int:
    """Bytes of one value on the wire."""
    return WIRE_TYPES[kind].itemsize


def narrow(rows: Floats, kind: RowKind) -> Hidden:
    """The rows [rows, hidden_size] in the kind in which they travel, each value rounded to the nearest, ties to even.

    Raises:
        RowsTooLargeError: a value is beyond float16.
    """
    if kind == "float32":
        return rows
    if kind == "float16":
        with np.errstate(over="ignore"):
            halves = rows.astype(WIRE_TYPES[kind])
        if not np.isfinite(halves).all():
            raise RowsTooLargeError(float(np.abs(rows).max()))
        return halves
    bits = rows.view(_U32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(_U16).view(WIRE_TYPES[kind])


def widen(hidden: Hidden) -> Floats:
    """The same values in float32."""
    kind = kind_of(hidden)
    if kind == "float32":
        return hidden
    if kind == "float16":
        return hidden.astype(np.float32)
    return (hidden.view(_U16).astype(_U32) << 16).view(np.float32)
