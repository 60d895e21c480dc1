"""Finds out how many blocks of a model each device can take, and states that as a problem for the search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flowspec_edge.core.planning.placement import Device, Links, ModelNeeds
from flowspec_edge.core.planning.ring_order import Numbers
from flowspec_edge.core.planning.ring_problem import RingProblem
from flowspec_edge.core.planning.shared_cores import groups_of
from flowspec_edge.core.planning.throughput import Throughput
from flowspec_edge.core.wire import ROW_BYTES


@dataclass(frozen=True, slots=True)
class Fit:
    """A precision, and the most blocks in it for which a device has room."""

    precision: str
    num_blocks: int


class Choices:
    """Devices, and how many blocks of the model each of them can take in which precision."""

    def __init__(self, devices: Sequence[Device], links: Links, model: ModelNeeds, throughput: Throughput) -> None:
        self.devices = list(devices)
        self.links, self.model, self.throughput = links, model, throughput
        self.fits = [fits_of(device, model) for device in devices]

    def are_mates(self, i: int, j: int) -> bool:
        """Whether two devices share the cores of one machine."""
        return self.devices[i].machine == self.devices[j].machine != ""

    def precision(self, i: int, num_blocks: int, num_rows: int) -> str:
        """The quickest precision in which device ``i`` can take ``num_blocks``."""
        fits = [fit for fit in self.fits[i] if fit.num_blocks >= num_blocks]
        return min(fits, key=lambda fit: self.devices[i].layer[fit.precision].at(num_rows)).precision

    def row_bytes(self, *, is_first: bool) -> int:
        """Bytes of a row on a hop. The first hop carries no hidden values."""
        return ROW_BYTES + (0 if is_first else self.model.row_bytes)

    def problem(self) -> RingProblem:
        """The problem for the search, in numbers."""
        num_stages = range(1, min(len(self.devices), len(self.model.blocks)) + 1)
        sizes = {stages: self.throughput.chunk_rows(stages) for stages in num_stages}

        def rate(num_rows: int, trip: Any, interval: Any, count: Any) -> Any:
            found = self.throughput.tokens_per_s(num_rows, trip, interval, count)
            if len(set(sizes.values())) == 1:
                return found
            allowed = [stages for stages, rows in sizes.items() if num_rows in rows]
            return np.where(np.isin(count, allowed), found, 0.0)

        rows = sorted({size for chosen in sizes.values() for size in chosen})
        names = [device.node for device in self.devices]
        hops = [[self.links.between(a, b) for b in [*names, self.links.origin]] for a in [*names, self.links.origin]]
        latency = np.array([[hop.latency_ms for hop in row] for row in hops])
        per_byte = np.array([[hop.ms_per_byte for hop in row] for row in hops])
        row = per_byte * self.row_bytes(is_first=False)
        row[-1] = per_byte[-1] * self.row_bytes(is_first=True)
        for matrix in (latency, row):
            np.fill_diagonal(matrix, np.inf)
        return RingProblem(
            stage={size: self._stage_ms(size) for size in rows},
            last={size: np.array([d.last.scaled(d.slowdown).at(size) for d in self.devices]) for size in rows},
            beside=np.array([device.beside_ms for device in self.devices]),
            latency=latency,
            row=row,
            head=self.model.head_ms,
            rate=rate,
            crowds=tuple(
                {i: self.devices[i].core_share for i in group}
                for group in groups_of(device.machine for device in self.devices)
            ),
        )

    def _stage_ms(self, num_rows: int) -> Numbers:
        table = np.full((len(self.devices), len(self.model.blocks) + 1), np.inf)
        for i, (device, fits) in enumerate(zip(self.devices, self.fits, strict=True)):
            for fit in fits:
                line = [device.stage(fit.precision, k * self.model.layers_per_block) for k in range(fit.num_blocks + 1)]
                times = np.array([stage.at(num_rows) for stage in line])
                table[i, : len(times)] = np.minimum(table[i, : len(times)], times)
        table[:, 0] = 0.0
        return table


def fits_of(device: Device, model: ModelNeeds) -> list[Fit]:
    """The most blocks for which a device has room, in each precision in which it has room for any."""
    fits = []
    for precision in device.layer:
        num_blocks = len(model.blocks)
        while num_blocks and model.memory_bytes_on(device, precision, num_blocks) > device.free_memory_bytes:
            num_blocks -= 1
        if num_blocks:
            fits.append(Fit(precision, num_blocks))
    return fits
