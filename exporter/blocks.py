"""Matrices in blocks along the input axis, each with a scale of its own: multiplied as they are, or unpacked before."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from onnxruntime.capi._pybind_state import quantize_matmul_4bits, quantize_matmul_8bits

from exporter.matrices import float_product, parts_of
from exporter.onnx_file import Writer
from exporter.rounding import INTEGER_ACTIVATIONS, round_activations

BLOCK_SIZE = 32
"""Weights along the input axis that share a scale where this project rounds them itself."""


class BlockMatrix(ABC):
    """Levels of ``bits`` bits: ``weight = scale * level + offset``, with one of each for each block of a row.

    Activations are rounded to 8 bits, a scale for each block or row as the processor's kernel has it; their sums, which
    offsets are multiplied by, are not. Some outputs at a time are in memory.
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]: ...

    @abstractmethod
    def part(self, start: int = 0, stop: int | None = None) -> Blocks:
        """The outputs ``[start, stop)``."""

    @property
    def memory_bytes(self) -> int:
        """A session keeps scales as they are and among the packed levels, and a sum of each block's levels (x86)."""
        one = self.part(0, 1)
        of_blocks = 3 * one.scales.nbytes + (0 if one.offsets is None else one.offsets.nbytes)
        return self.shape[0] * (one.levels.size * one.bits // 8 + of_blocks)

    def write(self, to: Writer, rows: str, outputs: tuple[str, ...] = ()) -> str:
        (num_out, num_in), one = self.shape, self.part(0, 1)
        (_, num_blocks, block_size), has_offsets = one.levels.shape, one.offsets is not None
        packed = num_out, num_blocks, block_size * one.bits // 8
        numbers = [(part.scales, part.centred_offsets() if has_offsets else None) for part in self._parts()]
        product = to.add(
            "MatMulNBits",
            rows,
            to.made_tensor("levels", packed, np.uint8, lambda: (part.packed() for part in self._parts())),
            to.tensor("scales", np.concatenate([scales for scales, _ in numbers])),
            outputs=() if has_offsets else outputs,
            K=num_in,
            N=num_out,
            bits=one.bits,
            block_size=block_size,
            accuracy_level=INTEGER_ACTIVATIONS,
        )
        if not has_offsets:
            return product

        def add_up() -> str:  # [rows, num_blocks]
            blocks = to.reshape(rows, -1, num_blocks, block_size)
            return to.add("ReduceSum", blocks, to.constant([2]), keepdims=0)

        sums = to.prepared(f"sums of {block_size}", rows, add_up)
        offsets = to.tensor("offsets", np.concatenate([offsets for _, offsets in numbers if offsets is not None]).T)
        return to.add("Add", product, to.add("MatMul", sums, offsets), outputs=outputs)

    def unpacked(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """In float32: [outputs, num_in]."""
        return self.part(start, stop).unpacked()

    def times(self, rows: np.ndarray) -> np.ndarray:
        return np.concatenate([part.product(rows) for part in self._parts()], axis=-1)

    def _parts(self) -> Iterator[Blocks]:
        return (self.part(start, stop) for start, stop in parts_of(self))


@dataclass(frozen=True)
class Blocks(BlockMatrix):
    """Such a matrix in memory.

    Attributes:
        levels: int8 [num_out, num_blocks, block_size].
        scales: float32 [num_out, num_blocks].
        offsets: float32 [num_out, num_blocks], or None where all are zero.
        num_padding: levels at the end of each row that stand for no weight.
        middle: the level that a graph counts from: levels around it are half as large as those that begin at 0.
    """

    bits: int
    levels: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray | None = None
    num_padding: int = 0
    middle: int = 0

    @classmethod
    def rounded(cls, weights: np.ndarray, bits: int) -> Blocks:
        """Weights, [num_out, num_in], rounded to blocks of BLOCK_SIZE around 0, as ONNX Runtime's own tool does."""
        num_out, num_in = weights.shape
        num_blocks = -(-num_in // BLOCK_SIZE)
        padded = np.zeros((num_blocks * BLOCK_SIZE, num_out), np.float32)
        padded[:num_in] = weights.T
        packed = np.zeros((num_out, num_blocks, BLOCK_SIZE * bits // 8), np.uint8)
        scales = np.zeros((num_out, num_blocks), np.float32)
        zero_points = np.zeros((num_out, -(-num_blocks * bits // 8)), np.uint8)
        pack = quantize_matmul_4bits if bits == 4 else quantize_matmul_8bits
        pack(packed, padded, scales, zero_points, BLOCK_SIZE, num_out, num_in, True)
        if bits == 4:  # of a pair, the even weight is in the lower half
            packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(num_out, num_blocks, BLOCK_SIZE)
        levels = (packed.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)
        return cls(bits, levels, scales, num_padding=len(padded) - num_in)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.levels), self.levels[0].size - self.num_padding

    def take(self, rows: np.ndarray | slice) -> Blocks:
        """The matrix of these rows in this order."""
        offsets = None if self.offsets is None else self.offsets[rows]
        return replace(self, levels=self.levels[rows], scales=self.scales[rows], offsets=offsets)

    def part(self, start: int = 0, stop: int | None = None) -> Blocks:
        return self.take(np.s_[start:stop])

    def unpacked(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        weights = self.scales[start:stop, :, None] * self.levels[start:stop].astype(np.float32)
        if self.offsets is not None:
            weights += self.offsets[start:stop, :, None]
        return weights.reshape(len(weights), -1)[:, : self.shape[1]]

    def packed(self) -> np.ndarray:
        """The levels around the middle one as MatMulNBits has them: uint8 [num_out, num_blocks, bytes of a block]."""
        shift = np.uint8(2 ** (self.bits - 1) - self.middle)
        levels = (self.levels.view(np.uint8) + shift).reshape(self.levels.shape)
        return levels if self.bits == 8 else levels[..., ::2] | levels[..., 1::2] << 4

    def centred_offsets(self) -> np.ndarray:
        """The offsets of weights whose levels are counted from the middle one: float32 [num_out, num_blocks].

        Such levels are half as large as those from 0, and so is what rounded activations lose by them.
        """
        assert self.offsets is not None
        offsets: np.ndarray = self.offsets + self.scales * np.float32(self.middle)
        return offsets

    def product(self, rows: np.ndarray) -> np.ndarray:
        """What a graph computes for ``rows``, [rows, num_in]: [rows, num_out]."""
        padded = np.pad(rows, ((0, 0), (0, self.num_padding)))
        block_size = self.levels.shape[2]
        levels = self.levels.astype(np.float32)
        levels -= np.float32(self.middle)
        levels *= self.scales[..., None]
        product: np.ndarray = round_activations(padded, self.bits, block_size) @ levels.reshape(len(levels), -1).T
        if self.offsets is not None:
            product += padded.reshape(len(rows), -1, block_size).sum(axis=2) @ self.centred_offsets().T
        return product


@dataclass(frozen=True)
class UnpackedBlocks:
    """Weights of 8 bits in the file, which sessions unpack to float32 when they load them.

    One operator unpacks them: with several in a row, each would hold the weights in float32 once more while loading.
    Multiplied as they are with float32 activations (MatMulNBits at accuracy level 1), they would take four times as
    long: 13.1 against 4.1 ms for 16 rows of the demo model's 8 layers (x86, one thread).
    """

    blocks: Blocks

    @property
    def shape(self) -> tuple[int, int]:
        return self.blocks.shape

    @property
    def memory_bytes(self) -> int:
        return 4 * self.shape[0] * self.shape[1]

    def write(self, to: Writer, rows: str, outputs: tuple[str, ...] = ()) -> str:
        num_out, num_in = self.shape
        levels = to.tensor("levels", self.blocks.levels.reshape(num_out, -1)[:, :num_in].T)
        scales = to.tensor("scales", self.blocks.scales.T)
        weights = to.add("DequantizeLinear", levels, scales, axis=0, block_size=BLOCK_SIZE)
        return to.add("MatMul", rows, weights, outputs=outputs)

    def unpacked(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.blocks.unpacked(start, stop)

    def times(self, rows: np.ndarray) -> np.ndarray:
        return float_product(self, rows)
