"""Writes what an EAGLE-1 head computes: its fused inputs and layer, and its own part of the target's head."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from exporter.config import LayerShape
from exporter.fused_attention import fused_caches, fused_inputs, write_fused_attention
from exporter.layer_graph import LayerWriter, Product, Weights, write_log_probs, write_logits
from exporter.matrices import Matrix
from exporter.onnx_file import Writer, floats, integers
from flowspec_edge.manifest import (
    FEATURE,
    HIDDEN,
    HIDDEN_OUT,
    TOKEN_EMBEDDING,
    TOP_K,
    TOP_LOG_PROBS,
    TOP_TOKENS,
)


def write_eagle1(shape: LayerShape, weights: Weights, path: Path) -> int:
    """Maps the next token's embedding and the target's normed hidden row to a guess of the next normed hidden row.

    Returns:
        The bytes that a session takes once it has loaded the file.

    Raises:
        CheckpointError: the weights do not fit into one file.
    """
    to, products = Writer(), dict[str, Product]()
    matrix, bias = weights["fc.weight"], weights.get("fc.bias")
    assert not isinstance(matrix, np.ndarray)
    fc = to.within("fc")
    rows = matrix.write(fc, fc.add("Concat", TOKEN_EMBEDDING, FEATURE, axis=-1))
    if isinstance(bias, np.ndarray):
        rows = fc.add("Add", rows, fc.tensor("bias", bias))
    layer = LayerWriter(to.within("layers.0"), "layers.0", shape, weights, products, write_fused_attention)
    layer.write(rows, 0, (HIDDEN_OUT,))
    past, present = fused_caches(shape, 0)
    given = [floats(name, 1, "rows", shape.hidden_size) for name in (TOKEN_EMBEDDING, FEATURE)]
    to.save(path, [*given, *fused_inputs(shape), *past], [floats(HIDDEN_OUT, 1, "rows", shape.hidden_size), *present])
    matrices = sum(weight.memory_bytes for weight in weights.values() if not isinstance(weight, np.ndarray))
    return matrices + to.loaded_bytes()


def write_top(matrix: Matrix, tokens: np.ndarray, path: Path, divisor: float = 1.0, cap: float | None = None) -> int:
    """Maps features to the ``k`` likeliest of the drafted tokens, by the target's ids, and their log-probabilities.

    ``matrix`` has the rows of ``tokens``, int64 [tokens], of the target's output matrix. ``divisor`` and ``cap`` are
    as those of ``write_head``, and so are what is returned and raised.
    """
    to = Writer("/lm_head")
    logits = write_logits(to, matrix, divisor, cap)
    drafted = write_log_probs(to, logits, to.new_name())
    to.add("Gather", to.tensor("target_tokens", tokens.astype(np.int64)), drafted, outputs=(TOP_TOKENS,))
    outputs = [floats(TOP_LOG_PROBS, "rows", "top"), integers(TOP_TOKENS, "rows", "top")]
    to.save(path, [floats(HIDDEN, "rows", matrix.shape[1]), integers(TOP_K, 1)], outputs)
    return matrix.memory_bytes + to.loaded_bytes()
