"""Takes the blocks of ggml's types apart, so that the weights are kept exactly as the file has them.

Every type is ``weight = scale * level + offset`` with one scale, and in some types one offset, for a block of 16 or 32
weights of a row. Layouts: ggml-quants.c; levels, scales and offsets give the same float32 bits as
``gguf.quants.dequantize``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from exporter.blocks import BlockMatrix, Blocks
from exporter.gguf.file import GgufTensor
from exporter.matrices import FloatMatrix, Matrix
from flowspec_edge.errors import CheckpointError

FLOATS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_MIDDLE = {4: 8, 8: 16}
"""Of levels that begin at 0: those of 4 bits, and those of 5 bits, which are kept in 8."""
_SUPER = 256
"""Weights of a block of the K types, which has 8 or 16 blocks with scales of their own in it."""


def read_matrix(tensor: GgufTensor, start: int = 0, stop: int | None = None) -> Blocks | np.ndarray:
    """The rows ``[start, stop)`` of a matrix at their own bytes: :class:`Blocks`, or an array [rows, num_in].

    An array is of float32 or float16. bfloat16 becomes float32, which holds it exactly.

    Raises:
        CheckpointError: the tensor's type is not supported, or the file cannot be read.
    """
    check_type(tensor)
    rows = tensor.read(start, stop)
    if tensor.type in FLOATS:
        return _floats(rows, tensor.type)
    size, unpack = _TYPES[tensor.type]
    num_out = len(rows)
    bits, levels, scales, offsets = unpack(rows.reshape(-1, size))
    num_blocks = scales.size // num_out
    return Blocks(
        bits,
        levels.reshape(num_out, num_blocks, -1),
        scales.reshape(num_out, num_blocks),
        None if offsets is None else offsets.reshape(num_out, num_blocks),
        middle=0 if offsets is None else _MIDDLE[bits],
    )


@dataclass(frozen=True)
class StoredBlocks(BlockMatrix):
    """A matrix of blocks that stays in its file, and is read some rows at a time.

    ``order`` says which stored row each of its rows is; None where they are all of them, in order.
    """

    tensor: GgufTensor
    order: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.tensor.shape[0] if self.order is None else len(self.order), self.tensor.shape[1]

    def part(self, start: int = 0, stop: int | None = None) -> Blocks:
        if self.order is None:
            return self._read(start, stop)
        rows = self.order[start:stop]
        first = int(rows.min())
        return self._read(first, int(rows.max()) + 1).take(rows - first)

    def _read(self, start: int, stop: int | None) -> Blocks:
        found = read_matrix(self.tensor, start, stop)
        assert isinstance(found, Blocks)
        return found


def open_matrix(tensor: GgufTensor, order: np.ndarray | None = None) -> Matrix:
    """The whole matrix, with its rows in another order where one is given: stored row of each."""
    if tensor.type not in FLOATS:
        return StoredBlocks(tensor, order)
    found = read_matrix(tensor)
    assert isinstance(found, np.ndarray)
    return FloatMatrix(found if order is None else found[order])


def read_floats(tensor: GgufTensor) -> np.ndarray:
    """A tensor's values in float32, in its shape. Raises CheckpointError as :func:`read_matrix` does."""
    found = read_matrix(tensor)
    values = found.unpacked() if isinstance(found, Blocks) else found.astype(np.float32)
    return values.reshape(tensor.shape)


def check_type(tensor: GgufTensor) -> None:
    """Raise CheckpointError where a tensor is of a type that is not read."""
    if tensor.type not in FLOATS and tensor.type not in _TYPES:
        raise CheckpointError(
            f"{tensor.path}: tensor {tensor.name} is of type {tensor.type}, which is not supported; supported: "
            f"{', '.join([*FLOATS, *_TYPES])}"
        )


def _floats(rows: np.ndarray, kind: str) -> np.ndarray:
    values = rows.view(FLOATS[kind])
    return (values.astype(np.uint32) << 16).view(np.float32) if kind == "BF16" else values


# Each takes uint8 [num_blocks, bytes of a block] and returns bits, levels [num_blocks, weights], scales, offsets.
_Unpacked = tuple[int, np.ndarray, np.ndarray, np.ndarray | None]


def _halves(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 at byte ``start`` of each block, as float32 [num_blocks, 1]."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray, run: int) -> np.ndarray:
    """Levels of 4 bits, of which each run of ``run`` bytes has ``run`` in the lower halves and then ``run`` in the
    upper ones.
    """
    runs = packed.reshape(len(packed), -1, 1, run)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(len(packed), -1)


def _fifth_bits(packed: np.ndarray) -> np.ndarray:
    """The fifth bit of 32 levels, at its place: 4 bytes, lowest bit first."""
    return np.unpackbits(packed, axis=1, bitorder="little") << 4


def _q4_0(blocks: np.ndarray) -> _Unpacked:
    return 4, _nibbles(blocks[:, 2:], 16).astype(np.int8) - 8, _halves(blocks, 0), None


def _q4_1(blocks: np.ndarray) -> _Unpacked:
    return 4, _nibbles(blocks[:, 4:], 16).astype(np.int8), _halves(blocks, 0), _halves(blocks, 2)


def _q5_0(blocks: np.ndarray) -> _Unpacked:
    levels = _nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks[:, 2:6])
    return 8, levels.astype(np.int8) - 16, _halves(blocks, 0), None


def _q5_1(blocks: np.ndarray) -> _Unpacked:
    levels = _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks[:, 4:8])
    return 8, levels.astype(np.int8), _halves(blocks, 0), _halves(blocks, 2)


def _q8_0(blocks: np.ndarray) -> _Unpacked:
    return 8, blocks[:, 2:].view(np.int8), _halves(blocks, 0), None


def _scales_and_minima(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and offsets of the 8 blocks of a Q4_K or Q5_K block, whose 6-bit numbers are in its bytes 4 to 16."""
    first, second, rest = (blocks[:, start : start + 4] for start in (4, 8, 12))
    scales = np.concatenate([first & 63, (rest & 15) | ((first >> 2) & 48)], axis=1).astype(np.float32)
    minima = np.concatenate([second & 63, (rest >> 4) | ((second >> 2) & 48)], axis=1).astype(np.float32)
    return _halves(blocks, 0) * scales, -(_halves(blocks, 2) * minima)


def _q4_k(blocks: np.ndarray) -> _Unpacked:
    return 4, _nibbles(blocks[:, 16:], 32).astype(np.int8), *_scales_and_minima(blocks)


def _q5_k(blocks: np.ndarray) -> _Unpacked:
    shifts = np.arange(8, dtype=np.uint8)[None, :, None]
    fifth = (blocks[:, None, 16:48] >> shifts) & 1  # bit i of byte j is of weight j of block i
    levels = _nibbles(blocks[:, 48:], 32) | (fifth << 4).reshape(len(blocks), _SUPER)
    return 8, levels.astype(np.int8), *_scales_and_minima(blocks)


def _q6_k(blocks: np.ndarray) -> _Unpacked:
    low = _nibbles(blocks[:, :128], 64)
    shifts = np.array([0, 2, 4, 6], np.uint8)[None, None, :, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    levels = (low | (high << 4).reshape(len(blocks), _SUPER)).astype(np.int8) - 32
    return 8, levels, _halves(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32), None


_TYPES: dict[str, tuple[int, Callable[[np.ndarray], _Unpacked]]] = {
    "Q8_0": (34, _q8_0),
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q5_0": (22, _q5_0),
    "Q5_1": (24, _q5_1),
    "Q4_K": (144, _q4_k),
    "Q5_K": (176, _q5_k),
    "Q6_K": (210, _q6_k),
}
"""Bytes of a stored block, and how it is taken apart."""
