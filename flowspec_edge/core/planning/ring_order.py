"""Finds the shortest way around a ring by a dynamic program over subsets (Held and Karp, 1962), on whole arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Integers = NDArray[np.int64]


class Paths:
    """The shortest ways through all subsets of devices, from the origin and back to it.

    Where all orders are equally long, as between devices at one switch, no table is made.
    """

    def __init__(self, hop: Numbers) -> None:
        is_way = ~np.eye(len(hop), dtype=bool)
        self._hop = np.where(is_way, hop, np.inf)
        self._away = self._hop.min(axis=1)
        with np.errstate(invalid="ignore"):  # where there is no way at all
            self._into = (self._hop - self._away[:, None]).min(axis=0)
            beyond = np.where(is_way, hop - self._away[:, None] - self._into, 0.0)
        self.is_flat = bool(np.isfinite(beyond).all() and np.allclose(beyond, 0.0, atol=1e-9))
        self._table: Numbers | None = None

    @property
    def _paths(self) -> Numbers:
        if self._table is None:
            self._table = shortest_paths(self._hop)
        return self._table

    def sum_ms(self, inside: Numbers) -> Numbers:
        """A lower bound of the way through the devices in each column of ``inside``.

        It is exact where all orders are equally long.
        """
        ends = self._away + self._into
        ways: Numbers = np.matmul(ends[:-1], inside) + ends[-1]
        return ways

    def least_ms(self, subsets: Integers, inside: Numbers, last: int | None = None) -> Numbers:
        """The shortest way through each subset, ending with the device ``last`` if it is given.

        ``subsets`` are given as bits, and once more as ``inside`` [devices, subsets], 0 or 1.
        """
        if self.is_flat:
            return self.sum_ms(inside)
        if last is not None:
            ways: Numbers = self._paths[last, subsets] + float(self._hop[last, -1])
        else:
            ways = (self._paths[:, subsets] + self._hop[:-1, -1, None]).min(axis=0)
        return ways

    def order(self, subset: int, last: int) -> list[int] | None:
        """The devices of a subset in the order of the shortest way that ends with ``last``; None without a way."""
        if self.is_flat:
            return [*(i for i in range(len(self._hop) - 1) if subset >> i & 1 and i != last), last]
        if not np.isfinite(self._paths[last, subset] + self._hop[last, -1]):
            return None
        return read_order(self._paths, self._hop, last, subset)


def shortest_paths(hop: Numbers, joining: Numbers | None = None) -> Numbers:
    """The length of the shortest path from the origin through all devices of a subset, by last device and subset.

    The result is [m, 2**m] for ``m`` devices. ``hop`` is [m + 1, m + 1] with the origin last, and infinite where there
    is no way. ``joining[subset, i]`` is added where device ``i`` follows the devices of that subset.
    """
    m = len(hop) - 1
    first, *larger = _sizes(m)
    paths = np.full((m, 2**m), np.inf)
    paths[range(m), first.subsets] = hop[m, :m] + (0.0 if joining is None else joining[0])
    known = paths[:, first.subsets]  # for the subsets of one size: [last device, subset]
    for size in larger:
        longer = np.full((m, len(size.subsets)), np.inf)
        for i, (places, before) in enumerate(size.extended):
            best = (known + hop[:m, i, None]).min(axis=0)[before]
            longer[i, places] = best if joining is None else best + joining[size.subsets[places] ^ (1 << i), i]
        paths[:, size.subsets] = known = longer
    return paths


def over_subsets(values: Numbers, combine: Callable[[Numbers, float], Numbers], empty: float) -> Numbers:
    """Combine the values of each subset by ``combine``: [2**m] by the subset's bits. The empty subset has ``empty``."""
    table = np.array([empty])
    for value in values:
        table = np.concatenate([table, combine(table, float(value))])
    return table


def read_order(paths: Numbers, hop: Numbers, last: int, subset: int) -> list[int]:
    """The order of devices on the shortest path through ``subset`` to ``last``. There must be such a path."""
    order = [last]
    while subset := subset ^ (1 << order[-1]):
        order.append(int(np.argmin(paths[:, subset] + hop[:-1, order[-1]])))
    return order[::-1]


class _Size(NamedTuple):
    """The subsets of one size, as bits.

    ``extended`` has two arrays for each device ``i``. The first has the places in ``subsets`` of those that hold ``i``.
    The second has, for each of these, the place of the same subset without ``i`` among the subsets of one device less.
    """

    subsets: Integers
    extended: list[tuple[Integers, Integers]]


@functools.lru_cache(maxsize=20)
def _sizes(m: int) -> list[_Size]:
    """The subsets of ``m`` devices by their size, from one device to all of them."""
    subsets = np.arange(2**m, dtype=np.int64)
    count = sum((subsets >> i & 1 for i in range(m)), np.zeros_like(subsets))
    place = np.zeros_like(subsets)
    sizes = []
    for num_devices in range(1, m + 1):
        here = np.flatnonzero(count == num_devices)
        place[here] = np.arange(len(here))
        having = [np.flatnonzero(here >> i & 1) for i in range(m)]
        sizes.append(_Size(here, [(places, place[here[places] ^ (1 << i)]) for i, places in enumerate(having)]))
    return sizes
