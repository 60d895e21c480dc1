"""The demo bundle's graphs, and rows to run through them."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.core.events import RunForward
from flowspec_edge.core.rows import NO_PARENT, Row
from flowspec_edge.core.speculation.kv_slots import KvSlots
from flowspec_edge.engine.stage_runner import StageRunner
from tests.narrowing import present

NUM_LAYERS = 8


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    return Bundle.load(DEMO_BUNDLE)


@pytest.fixture(scope="session")
def whole(bundle: Bundle) -> StageRunner:
    """All layers as one stage."""
    return StageRunner(bundle.directory, bundle.manifest, 0, NUM_LAYERS)


class Session:
    """One session of a chain of stages, with its slots."""

    def __init__(self, *stages: StageRunner, capacity: int = 400) -> None:
        self.stages = stages
        self.slots = KvSlots(capacity)
        for stage in stages:
            stage.open_cache(1, capacity)

    def run(self, rows: Sequence[Row], is_cancelled: Callable[[], bool] = lambda: False) -> np.ndarray:
        """Hidden rows after the last stage."""
        placement = self.slots.place(rows)
        hidden: np.ndarray | None = None
        for stage in self.stages:
            forward = RunForward(1, tuple(rows), hidden, placement)
            hidden = stage.run(forward, is_cancelled).hidden.copy()
        return present(hidden)

    def drop(self, ids: Sequence[int]) -> None:
        self.slots.drop(ids)


def make_chain(tokens: Sequence[int], first: int = 0) -> list[Row]:
    return [Row(i, i - 1 if i else NO_PARENT, int(token)) for i, token in enumerate(tokens, first)]


@pytest.fixture(scope="session")
def tokens() -> list[int]:
    found: list[int] = np.random.default_rng(5).integers(2, 2048, 64).tolist()
    return found
