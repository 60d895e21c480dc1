"""What decides on the bits of a forward on this machine, beside the model's files: processor, runtime and precision."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import onnxruntime as ort

EXTENSIONS = ("avx512f", "avx2", "avx", "asimdhp", "asimd")
"""Vector instructions for which ONNX Runtime has kernels of their own, the widest first, by their names in Linux. Sums
are added up in another order in each."""


def arithmetic_of(precision: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """A description of the arithmetic, the same on all boards that give a row the same bits in this precision."""
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    flags = found[1].split() if found is not None else []
    extension = next((name for name in EXTENSIONS if name in flags), "no known extension")
    return f"{precision} on {platform.machine()}, {extension}, onnxruntime {ort.__version__}"
