"""A text without a model, a small ring for it, and the demo bundle."""

from collections.abc import Sequence

import numpy as np
import pytest

from flowspec_edge.bench.compare import Bench
from flowspec_edge.bench.tape import Tape
from flowspec_edge.bench.testbed import StageCost, Testbed
from flowspec_edge.bundle import DEMO_BUNDLE, Bundle

VOCAB = 8


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    return Bundle.load(DEMO_BUNDLE)


@pytest.fixture(scope="session")
def bench(bundle: Bundle) -> Bench:
    return Bench(bundle)


@pytest.fixture
def two_stages() -> Testbed:
    """A row of hidden values takes 1 ms on the wire."""
    return Testbed(
        name="two-stages",
        stages=(
            StageCost(fixed_ms=10, row_ms=1, num_layers=5),
            StageCost(fixed_ms=20, row_ms=2, num_layers=5),
        ),
        hop_ms=3,
        rate_mbit_per_s=8,
        hidden_bytes=1000,
        head_ms=5,
        draft_pass_ms=7,
        draft_row_ms=0.5,
    )


def make_tape(num_prompt: int, tokens: Sequence[int]) -> Tape:
    """A target that is sure of every token."""
    logits = np.zeros((len(tokens), VOCAB), np.float32)
    logits[np.arange(len(tokens) - 1), tokens[1:]] = 1
    return Tape(num_prompt, tuple(tokens), np.zeros((len(tokens), 4), np.float32), logits)
