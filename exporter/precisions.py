"""The precisions that a bundle may have: the form of their matrices, and how near graphs must be to what they stand
for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from exporter.blocks import BlockMatrix, Blocks, UnpackedBlocks
from exporter.calibration import Activations
from exporter.error_feedback import rounded_with_feedback
from exporter.matrices import FloatMatrix, HalfMatrix, Matrix, PerTokenMatrix, SplitMatrix, parts_of

OWN = "own"
"""Of a GGUF file: every matrix as the file has it."""
KEPT_SHARE = 0.01
"""Of a matrix's columns, that are multiplied in float32 where activations are rounded (docs/performance.md, "What
precisions cost").
"""
CALIBRATION_TOKENS = 2048
"""Of text, where rounding follows it."""
MakeForm = Callable[[Matrix, Activations | None], Matrix]


@dataclass(frozen=True)
class Precision:
    """One precision.

    ``make`` gives a matrix the form that it has in this precision, and is told what enters the matrix on
    ``num_calibration_tokens`` of text, where there are any: of the layers and the head, but for matrices whose names
    end in one of ``passed_over``.

    ``tolerance`` is the largest error of one block, relative to the rows' RMS (see manifest.Parity). Products of floats
    are compared with float32, where nothing but the order of sums differs: the demo model's whole chain has an error of
    6e-6. Each product of bytes is compared with the same arithmetic in numpy (reference.FollowedProducts): of
    SmolLM2's layers the worst has 4e-5. A drafter is compared with float32 in any case, and may be off by
    ``drafter_tolerance``, for it changes no text.

    ``reference`` says in the manifest what the blocks were compared with, and ``explained`` what the precision is.
    """

    name: str
    make: MakeForm
    tolerance: float
    drafter_tolerance: float
    reference: str
    explained: str
    rounds_activations: bool = False
    num_calibration_tokens: int = 0
    passed_over: tuple[str, ...] = ()
    feeds_back: bool = False

    def form(self, matrix: Matrix, activations: Activations | None = None) -> Matrix:
        """The form that a matrix has in this precision.

        Raises:
            CheckpointError: it cannot have that form.
        """
        return self.make(matrix, activations)

    def looks_at(self, name: str) -> bool:
        """Whether what enters a matrix counts, whose name is given without ``.weight``."""
        return self.num_calibration_tokens > 0 and not name.endswith(self.passed_over)

    @property
    def of_drafters(self) -> Precision:
        """What a draft head has beside a model in this precision.

        Its first product takes a token's embedding together with a row of the model, which is many times as large: with
        one scale for both, as in w8a8, nothing would be left of the token. So it is 8 bits in blocks there, and beside
        a model in its own precision as well.
        """
        return PRECISIONS["q8"] if self.name in (OWN, "w8a8") else self

    @property
    def chain_tolerance(self) -> float:
        """The largest error of the whole chain: of one whose products round, no more than that it makes sense."""
        return self.drafter_tolerance if self.rounds_activations else self.tolerance


def _of_weights(form: Callable[[np.ndarray], Matrix]) -> MakeForm:
    """The form that ``form`` makes of the weights alone."""
    return lambda matrix, activations: form(matrix.unpacked())


def _beside_columns(form: Callable[[np.ndarray], Matrix]) -> MakeForm:
    """The form that ``form`` makes of all columns but those that the largest values multiply."""

    def make(matrix: Matrix, activations: Activations | None) -> Matrix:
        weights = matrix.unpacked()
        if activations is None:
            return form(weights)
        return SplitMatrix.of(weights, activations.largest_inputs(KEPT_SHARE), form)

    return make


def _as_it_is(matrix: Matrix, activations: Activations | None) -> Matrix:
    """The matrix, beside which such columns are multiplied in float32 where its product rounds activations."""
    if activations is None or not isinstance(matrix, BlockMatrix):
        return matrix
    columns = activations.largest_inputs(KEPT_SHARE)
    kept = [matrix.unpacked(start, stop)[:, columns] for start, stop in parts_of(matrix)]
    return SplitMatrix(matrix, columns, FloatMatrix(np.concatenate(kept)))


def _fed_back(bits: int) -> MakeForm:
    """Blocks beside such columns, where each column takes up the errors of those before it."""

    def make(matrix: Matrix, activations: Activations | None) -> Matrix:
        weights = matrix.unpacked()
        if activations is None:
            return Blocks.rounded(weights, bits)
        return rounded_with_feedback(weights, bits, activations.largest_inputs(KEPT_SHARE), activations)

    return make


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision(
            "fp32",
            _of_weights(FloatMatrix),
            1e-4,
            2e-4,
            "the checkpoint's weights in float32",
            "32-bit weights and arithmetic",
        ),
        Precision(
            "fp16",
            _of_weights(HalfMatrix.rounded),
            1e-2,
            2e-2,
            "the weights rounded to float16, in float32",
            "16-bit matrices, multiplied as such where the processor can, as 32-bit ones elsewhere",
        ),
        Precision(
            "int8",
            _of_weights(lambda weights: UnpackedBlocks(Blocks.rounded(weights, 8))),
            1e-4,
            2e-4,
            "the dequantised 8-bit weights in float32",
            "8-bit weights in the files, 32-bit in memory and arithmetic",
        ),
        Precision(
            "q8",
            _beside_columns(lambda weights: Blocks.rounded(weights, 8)),
            1e-3,
            1.0,
            "the same products of bytes in numpy",
            "8-bit weights, and activations of 8 bits, both in blocks of 32: nearer to the model than w8a8, and slower",
            rounds_activations=True,
            num_calibration_tokens=CALIBRATION_TOKENS,
        ),
        Precision(
            "w8a8",
            _beside_columns(PerTokenMatrix.rounded),
            1e-3,
            1.0,
            "the same products of bytes in numpy",
            "8-bit weights, and activations of 8 bits per token: the fastest for chunks on most processors",
            rounds_activations=True,
            num_calibration_tokens=CALIBRATION_TOKENS,
        ),
        Precision(
            "int4",
            _fed_back(4),
            1e-3,
            0.6,
            "the same products of bytes in numpy",
            "4-bit weights, activations of 8 bits: the smallest",
            rounds_activations=True,
            num_calibration_tokens=CALIBRATION_TOKENS,
            feeds_back=True,
        ),
        Precision(
            OWN,
            _as_it_is,
            1e-3,
            1.0,
            "the same arithmetic in numpy, on the file's own weights",
            "the weights of a quantised model exactly as its file has them, GGUF, GPTQ or AWQ; activations of 8 bits "
            "where weights are in blocks",
            rounds_activations=True,
            num_calibration_tokens=128,
            passed_over=("self_attn.o_proj", "mlp.down_proj"),  # in blocks, where few columns bring nothing there
        ),
    )
}
