"""Reads single fields of a ``config.json``."""

from __future__ import annotations

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
