"""Reads a ``config.json``, and single fields of one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowspec_edge.errors import CheckpointError


def positive_int(path: Path, config: Mapping[str, Any], field: str, default: int | None = None) -> int:
    value = default if config.get(field) is None else config[field]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{path}: {field} is {value!r}, expected a positive integer")
    return value


def positive_number(path: Path, config: Mapping[str, Any], field: str, default: float | None = None) -> float:
    value = default if config.get(field) is None else config[field]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise CheckpointError(f"{path}: {field} is {value!r}, expected a positive number")
    return float(value)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises CheckpointError where the file is missing or holds something else."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: {path.name} is missing")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise CheckpointError(f"{path}: not readable as JSON ({cause})") from cause
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data
