"""Rows of padding, which are added so that a row has the same bits in every chunk.

ONNX Runtime computes a single row with other code than several rows in the products of some precisions, and in the
fused attention of drafters. That one's softmax adds up the weights of four slots at a time, and then the remaining ones
one by one, so that a row's sum depends on how many slots come after its own. On x86 with AVX2 none remain, because
those kernels mask (onnxruntime 1.32).
"""

from __future__ import annotations

import re
from pathlib import Path

PADDED_ROWS = 2
"""The least number of rows of a chunk on a device where a row by itself has other bits."""
MIN_ATTENTION_ROWS = 2
MAX_ATTENTION_PADDING = 4
_MIN_ROWS = {"int4": 2, "own": 2}


def slots_at_a_time(cpuinfo: Path = Path("/proc/cpuinfo")) -> int:
    """Fused attention must have a multiple of this many slots here: a safe number where the processor is unknown."""
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:
        text = ""
    return 1 if re.search(r"^flags\s*:.*\bavx2\b", text, re.MULTILINE) else 4


SLOTS_AT_A_TIME = slots_at_a_time()


def min_rows(precision: str) -> int:
    """The least number of rows of a chunk for graphs of that precision."""
    return _MIN_ROWS.get(precision, 1)


def attention_padding(num_rows: int, num_slots: int) -> int:
    """How many rows of padding fused attention gets.

    They come after the ``num_rows`` of a chunk, and each takes a slot of its own behind the ``num_slots`` in use.
    """
    missing = max(MIN_ATTENTION_ROWS - num_rows, 0)
    return missing + -(num_slots + missing) % SLOTS_AT_A_TIME
