"""Rows of padding, which are added so that a row has the same bits in every chunk.

ONNX Runtime takes several rows at once in the products of some precisions, and the rows that are left with other code:
of products in 4 bits a Cortex-A76 takes four at once, and a Cortex-A72 computes a single row in another way than more
(onnxruntime 1.32). Which multiple of rows a chunk must have is found out on the device (``row_check``).

In the fused attention of drafters a single row is computed with other code too. Its softmax adds up the weights of four
slots at a time, and then the remaining ones one by one, so that a row's sum depends on how many slots come after its
own. On x86 with AVX2 none remain, because those kernels mask (onnxruntime 1.32).
"""

from __future__ import annotations

import re
from pathlib import Path

ROW_MULTIPLES = (1, 2, 4)
"""Chunks may have any number of rows, or get padding until it is a multiple of 2 or 4."""
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


def padded(num_rows: int, multiple: int) -> int:
    """So many rows with their padding."""
    return -(-num_rows // multiple) * multiple


def attention_padding(num_rows: int, num_slots: int) -> int:
    """How many rows of padding fused attention gets.

    They come after the ``num_rows`` of a chunk, and each takes a slot of its own behind the ``num_slots`` in use.
    """
    missing = max(MIN_ATTENTION_ROWS - num_rows, 0)
    return missing + -(num_slots + missing) % SLOTS_AT_A_TIME
