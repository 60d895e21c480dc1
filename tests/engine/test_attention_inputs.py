"""What a forward tells its layers: which rows of its path each row sees, with a window or without."""

from types import SimpleNamespace

import numpy as np
import pytest

from flowspec_edge.core.limits import RECENT_ROWS
from flowspec_edge.engine.attention_inputs import attention_inputs
from flowspec_edge.manifest import OLDER_BIAS, OLDER_MASK, RECENT_BIAS, of_sliding_layers

POSITIONS = np.array([0, 1, 5, 30, 31, 32, 33, 60, 99, 100, 126])


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 40, 100, 127, 1000])
def test_a_window_counts_the_last_rows_of_a_path_its_own_included(window: int) -> None:
    model = SimpleNamespace(num_heads=4, num_kv_heads=2, window=window)
    recent = np.zeros((len(POSITIONS), RECENT_ROWS), np.int64)
    inputs = attention_inputs(127, POSITIONS, recent, model, num_slots=256)
    for name, num_visible in (("", POSITIONS + 1), ("sliding", np.minimum(POSITIONS + 1, window))):
        bias, mask, recent_bias = (
            inputs[of_sliding_layers(kind) if name else kind].reshape(len(POSITIONS), -1)
            for kind in (OLDER_BIAS, OLDER_MASK, RECENT_BIAS)
        )
        for row, (position, number) in enumerate(zip(POSITIONS, num_visible, strict=True)):
            older = set(np.flatnonzero(mask[row]))
            newer = {int(position) - RECENT_ROWS + 1 + place for place in np.flatnonzero(recent_bias[row] == 0)}
            assert older | newer == set(range(position + 1 - number, position + 1)) and not older & newer
            assert (bias[row] == 0).tolist() == (mask[row] == 1).tolist()


def test_a_model_without_windows_gets_nothing_more() -> None:
    model = SimpleNamespace(num_heads=4, num_kv_heads=2, window=None)
    inputs = attention_inputs(0, np.array([0]), np.zeros((1, RECENT_ROWS), np.int64), model, num_slots=128)
    assert not any(name.startswith("sliding") for name in inputs)
