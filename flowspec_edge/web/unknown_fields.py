"""Finds fields within the objects of a request that nobody reads, which msgspec passes over without a word."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any, get_args

import msgspec

MAX_OBJECTS = 2_000
"""That are looked into: some 6 ms. What stands behind them in a request is not looked at."""
Kinds = tuple[type[msgspec.Struct], ...]


def unknown_within(sent: Mapping[str, msgspec.Raw], kind: type[msgspec.Struct], but: Collection[str]) -> list[str]:
    """The names of such fields within those of ``sent``, in the caller's words, as ``messages[0].colour``.

    What is empty is no field, nor is what is called as one in ``but``.
    """
    search = _Search(but)
    for name, kinds in _inner_kinds((kind,)).items():
        if name in sent:
            search.look_into(sent[name], kinds, name)
    return search.found


class _Search:
    def __init__(self, but: Collection[str]) -> None:
        self._but = but
        self._num_left = MAX_OBJECTS
        self.found: list[str] = []

    def look_into(self, value: msgspec.Raw, kinds: Kinds, name: str) -> None:
        if self._num_left <= 0:
            return
        self._num_left -= 1
        match memoryview(value)[:1].tobytes():
            case b"[":
                items = msgspec.json.decode(value, type=list[msgspec.Raw])
                for at, item in enumerate(items[: self._num_left]):
                    self.look_into(item, kinds, f"{name}[{at}]")
            case b"{":
                self._look_into_object(msgspec.json.decode(value, type=dict[str, msgspec.Raw]), kinds, name)

    def _look_into_object(self, fields: Mapping[str, msgspec.Raw], kinds: Kinds, name: str) -> None:
        known, inner = _names(kinds), _inner_kinds(kinds)
        for field, value in fields.items():
            if field in inner:
                self.look_into(value, inner[field], f"{name}.{field}")
            elif field not in known and field not in self._but and not is_empty(value):
                self.found.append(f"{name}.{field}")


def is_empty(value: msgspec.Raw) -> bool:
    """Whether a value says nothing, whatever it is the value of."""
    return len(memoryview(value)) <= len(b"null") and bytes(value) in (b"null", b"[]", b"{}")


@functools.cache
def _names(kinds: Kinds) -> frozenset[str]:
    """All that objects of these kinds have."""
    return frozenset(field.encode_name for kind in kinds for field in msgspec.structs.fields(kind))


@functools.cache
def _inner_kinds(kinds: Kinds) -> dict[str, Kinds]:
    """The fields that have objects of known kinds within."""
    fields = [field for kind in kinds for field in msgspec.structs.fields(kind)]
    inner = {field.encode_name: _kinds_in(field.type) for field in fields}
    return {name: found for name, found in inner.items() if found}


def _kinds_in(annotation: Any) -> Kinds:
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return (annotation,)
    return tuple(kind for part in get_args(annotation) for kind in _kinds_in(part))
