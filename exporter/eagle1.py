"""The EAGLE-1 draft head: fc(concat(embedding, feature)), one decoder layer without input norm, the target's head, or
the rows of it that a vocabulary of the head's own names.

Source: Li et al., "EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty", section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from exporter.config import LayerShape
from exporter.drafted_tokens import D2T, read_target_tokens
from exporter.eagle1_graph import write_eagle1, write_top
from exporter.fields import positive_int
from exporter.layer_graph import Weights
from exporter.matrices import FloatMatrix, Matrix, parts_of
from exporter.parity import ChainCheck, log_softmax
from exporter.precisions import Precision
from exporter.reference import NumpyLayers, finished_logits, in_float32
from exporter.source import Source
from exporter.steps import Step
from exporter.tensors import TensorFiles
from flowspec_edge.errors import CheckpointError
from flowspec_edge.manifest import FEATURE, HIDDEN, TOKEN_EMBEDDING, DrafterEntry, FileEntry, Geometry, describe_file

EMBEDDING = "embed_tokens.weight"
FC = "fc"


@dataclass(frozen=True)
class Eagle1Head:
    """A head read from disk.

    ``weights`` are float32 by their published names. ``target_tokens`` is the target's id of each draft token,
    [draft_vocab_size]; None where it drafts them all.
    """

    shape: LayerShape
    weights: Mapping[str, np.ndarray]
    target_tokens: np.ndarray | None = None

    def formed(self, precision: Precision) -> Weights:
        """The weights as a precision has them."""
        return {
            name: precision.form(FloatMatrix(weight)) if weight.ndim == 2 else weight
            for name, weight in self.weights.items()
        }

    def output_rows(self, target: Source) -> np.ndarray:
        """The target's output matrix for the tokens that are drafted, where these are not all: float32 [tokens,
        hidden_size].
        """
        assert self.target_tokens is not None
        matrix, tokens = target.lm_head(), self.target_tokens
        rows = np.empty((len(tokens), matrix.shape[1]), np.float32)
        for start, stop in parts_of(matrix):
            is_inside = (tokens >= start) & (tokens < stop)
            rows[is_inside] = matrix.unpacked(start, stop)[tokens[is_inside] - start]
        return rows


def read_eagle1(
    path: Path, config: dict[str, Any], tensors: TensorFiles, shape: LayerShape, target: Geometry
) -> Eagle1Head:
    """Read the tensors of a head. Its own copy of the embedding is not read.

    Raises:
        CheckpointError: a tensor is missing or of another shape, or has no place in such a head.
    """
    shape = replace(shape, norms=replace(shape.norms, before_attention=None))
    hidden = shape.hidden_size
    sizes = {f"{FC}.weight": (hidden, 2 * hidden), f"{FC}.bias": (hidden,)}
    sizes |= {f"layers.0.{name}": size for name, size in shape.tensor_shapes().items()}
    for name in tensors.names():
        if name not in sizes and name not in (EMBEDDING, D2T):
            raise CheckpointError(
                f"{tensors.directory}: has {name}, so it is neither an EAGLE-1 head (one layer, no input norm) "
                "nor an EAGLE-3 head (with a hidden_norm)"
            )
    if f"{FC}.bias" not in tensors:  # some heads lack it
        del sizes[f"{FC}.bias"]
    weights = {name: tensors.read(name, size) for name, size in sizes.items()}
    num_tokens = positive_int(path, config, "draft_vocab_size", target.vocab_size)
    drafts_all = num_tokens == target.vocab_size and D2T not in tensors
    return Eagle1Head(shape, weights, None if drafts_all else read_target_tokens(tensors, num_tokens, target))


class Eagle1Draft:
    """A head, the target that it is for, and how it is written."""

    taps: ClassVar[tuple[int, ...]] = ()
    libraries: ClassVar[tuple[str, ...]] = ("safetensors",)

    def __init__(self, head: Eagle1Head, target: Source) -> None:
        self._head, self._target = head, target

    def write(self, directory: Path, precision: Precision, check: ChainCheck) -> tuple[DrafterEntry, float]:
        """Write the files of the head to a bundle's ``directory``; return their entry, and the largest error.

        It is in the precision that draft heads have beside such a model.

        Raises:
            ParityError: a graph differs from numpy by more than the precision's tolerance for drafters.
        """
        precision = precision.of_drafters
        shape, weights = self._head.shape, self._head.formed(precision)
        path = directory / "drafter.onnx"
        memory_bytes = write_eagle1(shape, weights, path)
        errors = [check.check_drafter(_NumpyEagle1(shape, weights, check.capacity), shape, path)]
        top = None
        if self._head.target_tokens is not None:
            matrix = precision.form(FloatMatrix(self._head.output_rows(self._target)))
            top, top_bytes, error = self._write_top(directory, matrix, check)
            memory_bytes += top_bytes
            errors.append(error)
        entry = DrafterEntry(
            **describe_file(directory, path.name),
            memory_bytes=memory_bytes,
            kind="eagle1",
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            rope_frequencies=list(shape.rope_frequencies),
            taps=list(self.taps),
            fuse=None,
            top=top,
        )
        return entry, max(errors)

    def _write_top(self, directory: Path, matrix: Matrix, check: ChainCheck) -> tuple[FileEntry, int, float]:
        """The entry of the output matrix's file, the bytes that a session takes for it, and the error."""
        target, tokens = self._target.layer_shape, self._head.target_tokens
        assert tokens is not None
        path = directory / "draft_top.onnx"

        def log_probs_of(rows: np.ndarray, k: int) -> np.ndarray:
            logits = finished_logits(target, in_float32("", matrix, rows))
            largest: np.ndarray = -np.sort(-log_softmax(logits), axis=-1)[:, :k]
            return largest

        memory_bytes = write_top(matrix, tokens, path, target.logit_divisor, target.logit_cap)
        error = check.check_top(log_probs_of, path, len(tokens))
        return FileEntry(**describe_file(directory, path.name)), memory_bytes, error


class _NumpyEagle1:
    """What the graph must compute, with a cache of its own: in float32, whatever the products round."""

    def __init__(self, shape: LayerShape, weights: Weights, num_slots: int) -> None:
        self._weights = weights
        self._layer = NumpyLayers(shape, range(1), weights, num_slots, positions_before=1)

    def run(self, rows: Mapping[str, np.ndarray], step: Step) -> np.ndarray:
        matrix, bias = self._weights[f"{FC}.weight"], self._weights.get(f"{FC}.bias")
        assert not isinstance(matrix, np.ndarray)
        fused = in_float32(FC, matrix, np.concatenate((rows[TOKEN_EMBEDDING][0], rows[FEATURE][0]), axis=-1))
        if isinstance(bias, np.ndarray):
            fused = fused + bias
        return self._layer.run({HIDDEN: fused[None]}, step)
