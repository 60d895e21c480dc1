"""Reads the matrices of GPTQ and AWQ checkpoints at their own bits.

Both round the weights of a group of inputs to levels: ``weight = scale * (level - zero)``, with a float16 scale and a
whole zero point for each output and group. float32 holds each such weight exactly.

Layouts: ``QuantLinear`` in AutoGPTQ 0.7's ``qlinear_cuda.py``, which stores each zero point less 1 (``gptq``), where
GPTQModel's ``gptq_v2`` stores it as it is; ``WQLinear_GEMM`` and ``dequantize_gemm`` of AutoAWQ 0.2, whose words have
eight neighbouring outputs in the order 0, 2, 4, 6, 1, 3, 5, 7. Fields are those of transformers' ``GPTQConfig`` and
``AwqConfig``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporter.blocks import Blocks
from exporter.families import Config
from exporter.precisions import KEPT_SHARE
from exporter.tensors import TensorFiles
from flowspec_edge.errors import CheckpointError

BLOCK_SIZES = (32, 16)
"""That a group is cut into: the first one that divides it. In larger blocks, which MatMulNBits has too, a row's bits
depend on how many rows there are (onnxruntime 1.32, x86)."""
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word of AWQ's each of its eight outputs is."""
_READ: dict[str, dict[str, tuple[Any, ...]]] = {
    "gptq": {
        "bits": (4, 8),
        "checkpoint_format": ("gptq", "gptq_v2"),
        "is_marlin_format": (False,),
        "dynamic": ({},),
    },
    "awq": {"bits": (4,), "version": ("gemm",), "backend": ("autoawq",), "zero_point": (True,)},
}
"""The fields that say how tensors are laid out, and the values that are read; the first one where none is given."""


@dataclass(frozen=True)
class Quantisation:
    """How the matrices of a checkpoint are rounded.

    Attributes:
        group_size: inputs that share a scale; None: all of them.
        zero_offset: what is added to stored zero points.
    """

    method: str
    bits: int
    group_size: int | None
    zero_offset: int

    def __str__(self) -> str:
        groups = "whole rows" if self.group_size is None else f"groups of {self.group_size}"
        return f"{self.method.upper()}, {self.bits} bits in {groups}"

    @property
    def bytes_per_weight(self) -> float:
        """In a graph; scales, offsets, and columns kept in float32 included."""
        return self.bits / 8 + 8 / BLOCK_SIZES[0] + 4 * KEPT_SHARE

    def tensors_of(self, module: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The tensors of a matrix, [num_out, num_in], and their shapes."""
        (num_out, num_in), per_word = shape, 32 // self.bits
        num_groups = -(-num_in // (self.group_size or num_in))
        sizes: dict[str, tuple[int, ...]] = {
            "qweight": (num_in // per_word, num_out) if self.method == "gptq" else (num_in, num_out // per_word),
            "qzeros": (num_groups, num_out // per_word),
            "scales": (num_groups, num_out),
        }
        return {f"{module}.{name}": size for name, size in sizes.items()}

    def check(self, tensors: TensorFiles, module: str, shape: tuple[int, ...]) -> Iterator[str]:
        """Check a matrix's tensors but for the values of its weights, and yield their names.

        Raises:
            CheckpointError: one is missing or of another shape, or the matrix's layout is not read.
        """
        num_out, num_in = shape
        if self._block_size(num_in) is None or num_out % (32 // self.bits):
            raise CheckpointError(
                f"{tensors.directory}: {module} has {num_out} outputs of {num_in} inputs in {self}, expected whole "
                f"words of {32 // self.bits} outputs, and blocks of {', '.join(map(str, BLOCK_SIZES))} inputs"
            )
        for name, size in self.tensors_of(module, shape).items():
            tensors.check(name, size)
            yield name
        if (order := f"{module}.g_idx") in tensors:
            groups = tensors.read_integers(order, (num_in,))
            if not np.array_equal(groups, np.arange(num_in) // (self.group_size or num_in)):
                raise CheckpointError(
                    f"{tensors.directory}: tensor {order} has inputs in another order than that of their groups "
                    "(act-order, desc_act), which is not supported; use a checkpoint without it, or a GGUF file"
                )
            yield order

    def read(self, tensors: TensorFiles, module: str, shape: tuple[int, ...]) -> Blocks:
        """A matrix that :meth:`check` has passed."""
        (num_out, num_in), sizes = shape, self.tensors_of(module, shape)

        def levels_in(name: str) -> np.ndarray:
            found = _unpacked(tensors.read_integers(f"{module}.{name}", sizes[f"{module}.{name}"]), self.bits)
            return found if self.method == "gptq" else found[..., _PLACES]

        packed = levels_in("qweight")  # gptq: [words, num_out, inputs of a word], awq: [num_in, words, outputs of one]
        by_input = packed.swapaxes(1, 2) if self.method == "gptq" else packed
        levels = by_input.reshape(num_in, num_out).T
        scales = tensors.read(f"{module}.scales", sizes[f"{module}.scales"]).T  # [num_out, groups]
        zeros = levels_in("qzeros").reshape(-1, num_out).T + np.uint8(self.zero_offset)
        zeros &= np.uint8(2**self.bits - 1)  # a stored 0 - 1 has all bits
        middle, block_size = 2 ** (self.bits - 1), self._block_size(num_in)
        assert block_size is not None
        num_blocks = num_in // block_size
        blocks = np.arange(num_blocks) * block_size // (self.group_size or num_in)  # the group that each block is in
        scales = np.ascontiguousarray(scales[:, blocks])
        centred = (levels.astype(np.int16) - middle).astype(np.int8).reshape(num_out, num_blocks, block_size)
        offsets = scales * (np.float32(middle) - zeros[:, blocks])
        return Blocks(self.bits, centred, scales, offsets if offsets.any() else None)

    def _block_size(self, num_in: int) -> int | None:
        shared = math.gcd(self.group_size or num_in, num_in)
        return next((size for size in BLOCK_SIZES if shared % size == 0), None)


def read_quantisation(path: Path, config: Config) -> Quantisation | None:
    """How a ``config.json`` says that matrices are rounded, if it does.

    Raises:
        CheckpointError: in a way that is not read.
    """
    given = config.get("quantization_config")
    if not given:
        return None
    given = given if isinstance(given, dict) else {}
    method = str(given.get("quant_method") or "no method named")
    if method not in _READ:
        raise CheckpointError(
            f"{path}: the checkpoint is already quantised (quantization_config, {method}); of these GPTQ and AWQ are "
            "read: use one of them, the original weights, or a GGUF file"
        )
    found: dict[str, Any] = {}
    for name, values in _READ[method].items():
        value = given.get(name)
        found[name] = values[0] if value is None else value.lower() if isinstance(value, str) else value
        if found[name] not in values:
            raise CheckpointError(
                f"{path}: {method.upper()} of {name} {value!r} is not supported, expected "
                f"{' or '.join(map(repr, values))}"
            )
    size = given.get("group_size")
    if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != -1):
        raise CheckpointError(f"{path}: {method.upper()} of group_size {size!r}, expected a positive integer or -1")
    stores_less = found.get("checkpoint_format") == "gptq"
    return Quantisation(method, int(found["bits"]), None if size == -1 else size, zero_offset=int(stores_less))


def _unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """The levels in words of 32 bits, lowest bits first: uint8 [*words, levels of a word]."""
    found = np.ascontiguousarray(words).astype("<u4").view(np.uint8).reshape(*words.shape, 4)
    return found if bits == 8 else np.stack([found & 15, found >> 4], axis=-1).reshape(*words.shape, 8)
