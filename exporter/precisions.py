"""The precisions that a bundle may have: the form of their matrices, and how near graphs must be to what they stand
for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from exporter.blocks import Blocks, UnpackedBlocks
from exporter.matrices import FloatMatrix, HalfMatrix, Matrix, PerTokenMatrix

OWN = "own"
"""Of a GGUF file: every matrix as the file has it."""


@dataclass(frozen=True)
class Precision:
    """One precision.

    ``form`` gives a matrix the form that it has in this precision.

    ``tolerance`` is the largest error of one block, relative to the rows' RMS (see manifest.Parity). Products of floats
    are compared with float32, where nothing but the order of sums differs: the demo model's whole chain has an error of
    6e-6. Each product of bytes is compared with the same arithmetic in numpy (reference.FollowedProducts): of
    SmolLM2's layers the worst has 4e-5. A drafter is compared with float32 in any case, and may be off by
    ``drafter_tolerance``, for it changes no text. The demo model's has 0.77 in w8a8.

    ``reference`` says in the manifest what the blocks were compared with, and ``explained`` what the precision is.
    """

    name: str
    form: Callable[[Matrix], Matrix]
    tolerance: float
    drafter_tolerance: float
    reference: str
    explained: str
    rounds_activations: bool = False

    @property
    def chain_tolerance(self) -> float:
        """The largest error of the whole chain: of one whose products round, no more than that it makes sense."""
        return self.drafter_tolerance if self.rounds_activations else self.tolerance


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision(
            "fp32",
            lambda matrix: FloatMatrix(matrix.unpacked()),
            1e-4,
            2e-4,
            "the checkpoint's weights in float32",
            "32-bit weights and arithmetic",
        ),
        Precision(
            "fp16",
            lambda matrix: HalfMatrix.rounded(matrix.unpacked()),
            1e-2,
            2e-2,
            "the weights rounded to float16, in float32",
            "16-bit matrices, multiplied as such where the processor can, as 32-bit ones elsewhere",
        ),
        Precision(
            "int8",
            lambda matrix: UnpackedBlocks(Blocks.rounded(matrix.unpacked(), 8)),
            1e-4,
            2e-4,
            "the dequantised 8-bit weights in float32",
            "8-bit weights in the files, 32-bit in memory and arithmetic",
        ),
        Precision(
            "w8a8",
            lambda matrix: PerTokenMatrix.rounded(matrix.unpacked()),
            1e-3,
            1.0,
            "the same products of bytes in numpy",
            "8-bit weights, and activations of 8 bits per token: the fastest for chunks on most processors",
            rounds_activations=True,
        ),
        Precision(
            "int4",
            lambda matrix: Blocks.rounded(matrix.unpacked(), 4),
            1e-3,
            0.6,
            "the same products of bytes in numpy",
            "4-bit weights, activations of 8 bits: the smallest",
            rounds_activations=True,
        ),
        Precision(
            OWN,
            lambda matrix: matrix,
            1e-3,
            1.0,
            "the same arithmetic in numpy, on the file's own weights",
            "the weights of a GGUF file exactly as it has them; activations of 8 bits where weights are in blocks",
            rounds_activations=True,
        ),
    )
}
