"""Rows added to a chunk so that a row has the same bits whatever its chunk.

ONNX Runtime computes a row by itself with other code than rows together: in its attention operator, and in the products of some
precisions. And its softmax adds up the weights of four slots at a time, then what is left one by one, so that a row's sum depends
on how many slots come after its own; on x86 with AVX2 nothing is left over, since those kernels mask (onnxruntime 1.32).
"""

from __future__ import annotations

import re
from pathlib import Path

MIN_ATTENTION_ROWS = 2
MAX_ATTENTION_PADDING = 4
_MIN_ROWS = {"int4": 2}


def slots_at_a_time(cpuinfo: Path = Path("/proc/cpuinfo")) -> int:
    """Of how many slots attention must have a multiple on this processor; the safe number where it is not known."""
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:
        text = ""
    return 1 if re.search(r"^flags\s*:.*\bavx2\b", text, re.MULTILINE) else 4


SLOTS_AT_A_TIME = slots_at_a_time()


def min_rows(precision: str) -> int:
    """Of every chunk that a graph of that precision is given."""
    return _MIN_ROWS.get(precision, 1)


def attention_padding(num_rows: int, num_slots: int) -> int:
    """Rows that attention gets behind ``num_rows`` of a chunk, each with a slot of its own behind ``num_slots`` in use."""
    missing = max(MIN_ATTENTION_ROWS - num_rows, 0)
    return missing + -(num_slots + missing) % SLOTS_AT_A_TIME
