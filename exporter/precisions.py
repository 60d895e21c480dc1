"""The precisions that a bundle may have: how each is written, and how near to torch it must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import nn

from exporter.matmuls import halve_matrices, quantize_per_token, save_graph
from exporter.quantize import quantize_to_4_bits, store_in_8_bits

Rewrite = Callable[[Path, Path], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Precision:
    """One precision.

    ``rewrite`` turns a float32 file into one of this precision, and returns the matrices that the new file stands for.
    It is None where the file is not changed.

    ``tolerance`` is the largest error of one block against torch with those matrices, relative to the rows' RMS (see
    manifest.Parity). Where nothing but the order of sums differs, the demo model's whole chain has an error of 6e-6.
    Where activations are rounded, its worst block has 0.14 (w8a8) and 0.05 (int4); such errors say little of a whole
    chain, whose text is measured instead (manifest.Quality).

    ``reference`` says in the manifest what the blocks were compared with, and ``explained`` what the precision is.
    """

    name: str
    rewrite: Rewrite | None
    tolerance: float
    reference: str
    explained: str
    is_unpacked: bool = True  # whether weights are float32 in memory, whatever the file has

    @property
    def rounds_activations(self) -> bool:
        return self.tolerance > 1e-2

    def write(self, source: Path, path: Path) -> dict[str, torch.Tensor]:
        """Write the float32 file ``source`` to ``path`` in this precision, and return the matrices that differ from its
        own.
        """
        if self.rewrite is not None:
            return self.rewrite(source, path)
        save_graph(onnx.load(source), path)
        return {}

    def memory_bytes(self, module: nn.Module, path: Path) -> int:
        """Bytes of memory that the weights of a block take once they are loaded."""
        if self.is_unpacked:
            return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
        return path.stat().st_size


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp32", None, 1e-4, "the checkpoint's weights in float32", "32-bit weights and arithmetic"),
        Precision(
            "fp16",
            halve_matrices,
            1e-2,
            "the weights rounded to float16, in float32",
            "16-bit matrices, multiplied as such where the processor can, as 32-bit ones elsewhere",
        ),
        Precision(
            "int8",
            store_in_8_bits,
            1e-4,
            "the dequantised 8-bit weights in float32",
            "8-bit weights in the files, 32-bit in memory and arithmetic",
        ),
        Precision(
            "w8a8",
            quantize_per_token,
            0.5,
            "the dequantised 8-bit weights in float32",
            "8-bit weights, and activations of 8 bits per token: the fastest for chunks on most processors",
            is_unpacked=False,
        ),
        Precision(
            "int4",
            quantize_to_4_bits,
            0.3,
            "the dequantised 4-bit weights in float32",
            "4-bit weights, activations of 8 bits: the smallest",
            is_unpacked=False,
        ),
    )
}
