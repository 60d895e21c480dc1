from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from exporter.blocks import Blocks
from exporter.gguf.blocks import read_floats, read_matrix
from exporter.gguf.file import GgufFile
from flowspec_edge.errors import CheckpointError
from tests.exporter.gguf.conftest import stored_rows

Write = Callable[..., Path]
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("seed", range(3))
def test_weights_have_the_bits_that_ggml_says(kind: str, seed: int, write: Write) -> None:
    rows = stored_rows(kind, 40, 768, seed)
    tensor = GgufFile.open(write({}, {"matrix": (kind, rows)})).tensors["matrix"]
    expected = dequantize(rows, GGMLQuantizationType[kind])
    assert np.isfinite(expected).all()
    assert np.abs(expected).max() > 0.01
    found = read_floats(tensor)
    assert found.dtype == np.float32
    assert found.shape == (40, 768)
    assert found.tobytes() == expected.tobytes()
    some = read_matrix(tensor, 7, 11)
    some = some.unpacked() if isinstance(some, Blocks) else some.astype(np.float32)
    assert some.tobytes() == expected[7:11].tobytes()


@pytest.mark.parametrize(
    ("kind", "bits", "block_size", "has_offsets"),
    [
        ("Q8_0", 8, 32, False),
        ("Q4_0", 4, 32, False),
        ("Q4_1", 4, 32, True),
        ("Q5_0", 8, 32, False),
        ("Q5_1", 8, 32, True),
        ("Q4_K", 4, 32, True),
        ("Q5_K", 8, 32, True),
        ("Q6_K", 8, 16, False),
    ],
)
def test_levels_fit_their_bits(kind: str, bits: int, block_size: int, has_offsets: bool, write: Write) -> None:
    tensor = GgufFile.open(write({}, {"matrix": (kind, stored_rows(kind, 16, 512))})).tensors["matrix"]
    blocks = read_matrix(tensor)
    assert isinstance(blocks, Blocks)
    assert (blocks.bits, blocks.offsets is not None) == (bits, has_offsets)
    assert blocks.levels.shape == (16, 512 // block_size, block_size)
    lowest = 0 if has_offsets else -(2 ** (bits - 1))
    assert blocks.levels.min() >= lowest
    assert blocks.levels.max() <= lowest + 2**bits - 1
    order = np.array([3, 1, 2])
    assert (blocks.take(order).unpacked() == blocks.unpacked()[order]).all()


def test_zeros_stay_zeros(write: Write) -> None:
    for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        rows = quantize(np.zeros((2, 64), np.float32), GGMLQuantizationType[kind])
        tensor = GgufFile.open(write({}, {"matrix": (kind, rows)})).tensors["matrix"]
        assert not read_floats(tensor).any()


@pytest.mark.parametrize("kind", ["Q2_K", "IQ4_XS", "I32", "TQ1_0"])
def test_other_types_are_refused_by_name(kind: str, write: Write) -> None:
    rows = np.zeros((2, 256), np.int32) if kind == "I32" else stored_rows(kind, 2, 256)
    tensor = GgufFile.open(write({}, {"matrix": (kind, rows)})).tensors["matrix"]
    with pytest.raises(CheckpointError, match=f"tensor matrix is of type {kind}, which is not supported; .* Q6_K"):
        read_matrix(tensor)
