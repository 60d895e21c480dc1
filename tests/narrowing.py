"""What a test knows of a value and its declared type does not say. Where the test is wrong, it fails here."""

from typing import TypeVar

T = TypeVar("T")


def present(value: T | None) -> T:
    """``value``, which is not None."""
    assert value is not None
    return value


def instance(value: object, kind: type[T]) -> T:
    """``value``, which is of type ``kind``."""
    assert isinstance(value, kind), f"{value!r} is no {kind.__name__}"
    return value
