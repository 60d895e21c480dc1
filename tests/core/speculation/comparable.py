"""Actions and events as values that ``==`` compares, arrays included."""

import dataclasses
from typing import Any

import numpy as np


def comparable(value: Any) -> Any:
    """Dataclasses as their name and fields, arrays as lists; both sides of a comparison go through it."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if dataclasses.is_dataclass(value):
        return type(value).__name__, {
            field.name: comparable(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, (list, tuple)):
        return [comparable(item) for item in value]
    return value
