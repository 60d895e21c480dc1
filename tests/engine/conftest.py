"""The demo bundle's graphs, and rows to run through them."""

import numpy as np
import pytest

from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.core.events import RunForward
from flowspec_edge.core.rows import NO_PARENT, Row
from flowspec_edge.core.speculation.kv_slots import KvSlots
from flowspec_edge.engine.stage_runner import StageRunner

NUM_LAYERS = 8


@pytest.fixture(scope="session")
def bundle():
    return Bundle.load(DEMO_BUNDLE)


@pytest.fixture(scope="session")
def whole(bundle):
    """All layers as one stage."""
    return StageRunner(bundle.directory, bundle.manifest, 0, NUM_LAYERS)


class Session:
    """One session of a chain of stages, with its slots and the depth of each row."""

    def __init__(self, *stages, capacity=400):
        self.stages = stages
        self.slots = KvSlots(capacity)
        self.depths = {}
        self.moves = ()
        for stage in stages:
            stage.open_cache(1, capacity)

    def run(self, rows, **options):
        """Hidden rows after the last stage."""
        for row in rows:
            self.depths[row.id] = self.depths.get(row.parent, -1) + 1
        first = self.slots.append(rows)
        positions = np.array([self.depths[row.id] for row in rows], np.int64)
        mask = self.slots.ancestor_mask(first)
        moves, self.moves = self.moves, ()
        hidden = None
        for stage in self.stages:
            forward = RunForward(1, tuple(rows), hidden, moves, first, positions, mask)
            hidden = stage.run(forward, **options).hidden.copy()
        return hidden

    def drop(self, ids):
        self.moves = tuple(self.slots.drop(ids))


def make_chain(tokens, first=0):
    return [Row(i, i - 1 if i else NO_PARENT, int(token)) for i, token in enumerate(tokens, first)]


@pytest.fixture(scope="session")
def tokens():
    return np.random.default_rng(5).integers(2, 2048, 64).tolist()
