"""Which layers of a text were computed with another arithmetic than before, since they moved to another kind of board.

Boards of one kind give a row the same bits in one precision. Another processor adds up in another order, and another
precision rounds elsewhere, so a near tie between two tokens may turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ComputedLayers:
    """Layers ``[start, stop)``, and the arithmetic that decides on their bits, as a node describes it."""

    start: int
    stop: int
    arithmetic: str


@dataclass(frozen=True, slots=True)
class ChangedLayers:
    """Layers ``[start, stop)`` whose arithmetic was ``before`` and is ``after``."""

    start: int
    stop: int
    before: str
    after: str


def changed_layers(before: Sequence[ComputedLayers], after: Sequence[ComputedLayers]) -> list[ChangedLayers]:
    """The ranges that differ between two rings of one model, each as long as both sides stay the same."""
    edges = sorted({edge for layers in (*before, *after) for edge in (layers.start, layers.stop)})
    changed: list[ChangedLayers] = []
    for start, stop in itertools.pairwise(edges):
        was, now = _at(before, start), _at(after, start)
        last = changed[-1] if changed else None
        if last is not None and (last.stop, last.before, last.after) == (start, was, now):
            changed[-1] = ChangedLayers(last.start, stop, was, now)
        elif was != now:
            changed.append(ChangedLayers(start, stop, was, now))
    return changed


def _at(ring: Sequence[ComputedLayers], layer: int) -> str:
    return next(layers.arithmetic for layers in ring if layers.start <= layer < layers.stop)
