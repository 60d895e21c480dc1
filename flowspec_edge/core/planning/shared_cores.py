"""Cores that several nodes of one machine run on: what each of them keeps busy, counted once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cores:
    """The ``cores`` that a node may run on, by their numbers, and how many threads run a stage there.

    Nodes on one machine tell the same ``machine``. Where it is empty, a node shares its cores with none.
    """

    machine: str = ""
    cores: frozenset[int] = frozenset()
    num_threads: int = 1


def core_shares(nodes: Mapping[str, Cores]) -> dict[str, float]:
    """By node, the share of its machine's cores that a stage on it keeps busy while it runs. The cores of a machine are
    those that any of its nodes may run on.
    """
    of_machine: dict[str, frozenset[int]] = {}
    for node in nodes.values():
        of_machine[node.machine] = of_machine.get(node.machine, frozenset()) | node.cores
    return {
        name: min(node.num_threads / len(of_machine[node.machine]), 1.0) if node.machine and node.cores else 1.0
        for name, node in nodes.items()
    }


def crowding(nodes: Mapping[str, Cores]) -> dict[str, float]:
    """By node, how many times as long it may take while all nodes of its machine compute."""
    shares = core_shares(nodes)
    return {
        name: max(sum(shares[other] for other, mate in nodes.items() if mate.machine == node.machine), 1.0)
        if node.machine
        else 1.0
        for name, node in nodes.items()
    }


def groups_of(machines: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """The positions of equal names, of those that occur more than once and are not empty."""
    places: dict[str, list[int]] = {}
    for at, machine in enumerate(machines):
        places.setdefault(machine, []).append(at)
    return tuple(tuple(found) for machine, found in places.items() if machine and len(found) > 1)
