"""Writes what a bundle's graphs compute: any range of decoder layers, the final norm and the head.

This is the one definition of a layer for every way in, checkpoint or GGUF file, for every family, and for every form of
its matrices. What it must compute is said once more, in numpy (``reference.py``), which each graph is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import ValueInfoProto, numpy_helper

from exporter.canonical_attention import write_attention
from exporter.config import LayerShape
from exporter.joining import joined
from exporter.matrices import Matrix
from exporter.onnx_file import OPERATOR_BYTES, Size, Writer, floats, integers
from flowspec_edge.manifest import (
    ATTENTION_PADDING,
    CACHE_SLOTS,
    HIDDEN,
    HIDDEN_OUT,
    LOGITS,
    OLDER_BIAS,
    OLDER_MASK,
    PAST_KEY,
    PAST_VALUE,
    POSITION_IDS,
    PRESENT_KEY,
    PRESENT_VALUE,
    RECENT_BIAS,
    RECENT_SLOTS,
    ROTARY_COS,
    ROTARY_SIN,
    ROUNDS_CACHE,
    TOP_K,
    TOP_LOG_PROBS,
    TOP_TOKENS,
    of_sliding_layers,
)

WriteAttention = Callable[[Writer, str, str, str, int, LayerShape], str]
"""Adds to a graph what attention makes of queries, keys and values, of the layer of that number."""
Weights = Mapping[str, Matrix | np.ndarray]
"""Of layers, named ``layers.N.`` and as in a checkpoint. Matrices are of any form; norms and biases are float32."""


@dataclass(frozen=True)
class Product:
    """The rows that a matrix multiplies in a graph, and what comes out before any bias, by name and width.

    ``num_operators`` are written for it; what several products share counts for the first one.
    """

    rows: str
    num_in: int
    output: str
    num_out: int
    num_operators: int

    @property
    def names(self) -> tuple[str, str]:
        return self.rows, self.output

    def sizes(self) -> tuple[tuple[str, int], tuple[str, int]]:
        return (self.rows, self.num_in), (self.output, self.num_out)


def write_block(
    shape: LayerShape, start: int, stop: int, weights: Weights, path: Path, shown: Path | None = None
) -> dict[str, Product]:
    """Write the layers ``[start, stop)``; in ``weights`` the first of them is layer 0, and caches keep their numbers.

    The same graph is written to ``shown``, where one is given, with what matrices multiply and what comes out as
    further outputs.

    Returns:
        The products by the name of their matrix, without ``.weight``.

    Raises:
        CheckpointError: the weights do not fit into one file.
    """
    to = Writer()
    to.constants.append(numpy_helper.from_array(np.array(False), ROUNDS_CACHE))
    rows, products = HIDDEN, dict[str, Product]()
    if start == 0 and shape.embedding_scale != 1.0:
        rows = to.add("Mul", rows, to.constant(shape.embedding_scale))
    for layer in range(start, stop):
        prefix = f"layers.{layer - start}"
        named = (HIDDEN_OUT,) if layer == stop - 1 else ()
        rows = LayerWriter(to.within(prefix), prefix, shape, weights, products).write(rows, layer, named)
    layers = range(start, stop)
    inputs = [*_rows_in(shape), *_caches(shape, PAST_KEY, PAST_VALUE, layers)]
    outputs = [floats(HIDDEN_OUT, 1, "rows", shape.hidden_size), *_caches(shape, PRESENT_KEY, PRESENT_VALUE, layers)]
    to.save(path, inputs, outputs)
    if shown is not None:
        sizes = {name: size for product in products.values() for name, size in product.sizes() if name != HIDDEN}
        to.save(shown, inputs, outputs + [floats(name, 1, "rows", size) for name, size in sizes.items()])
    return products


def loaded_bytes(weights: Weights, products: Mapping[str, Product]) -> int:
    """What the weights of a block take in a session, and the operators of their products beyond one each."""
    matrices = sum(w.nbytes if isinstance(w, np.ndarray) else w.memory_bytes for w in weights.values())
    return matrices + OPERATOR_BYTES * sum(product.num_operators - 1 for product in products.values())


def _rows_in(shape: LayerShape) -> list[ValueInfoProto]:
    """The inputs of a block beside its caches, as manifest.py describes them."""
    scores: tuple[Size, ...] = ("groups", 1, 1, "group_rows", 1)
    inputs = [
        floats(HIDDEN, 1, "rows", shape.hidden_size),
        integers(ATTENTION_PADDING, 2),
        integers(POSITION_IDS, 1, "rows"),
        floats(ROTARY_COS, "positions", shape.head_dim // 2),
        floats(ROTARY_SIN, "positions", shape.head_dim // 2),
        integers(CACHE_SLOTS, shape.num_kv_heads, "rows", 3),
        floats(OLDER_BIAS, *scores, "slots"),
        floats(OLDER_MASK, *scores, "slots"),
        integers(RECENT_SLOTS, "groups", "group_rows", "recent"),
        floats(RECENT_BIAS, *scores, "recent"),
    ]
    if shape.window is not None:
        for given in list(inputs):
            if given.name in (ROTARY_COS, ROTARY_SIN, OLDER_BIAS, OLDER_MASK, RECENT_BIAS):
                inputs.append(ValueInfoProto(name=of_sliding_layers(given.name), type=given.type))
    return inputs


def _caches(shape: LayerShape, key: str, value: str, layers: range) -> list[ValueInfoProto]:
    """Keys and values of each layer; behind each value stands a 1."""
    size = shape.num_kv_heads, 1, "slots"
    keys = [floats(f"{key}.{layer}", *size, shape.head_dim) for layer in layers]
    return keys + [floats(f"{value}.{layer}", *size, shape.head_dim + 1) for layer in layers]


def write_final_norm(weight: np.ndarray, eps: float, path: Path) -> None:
    to = Writer("/norm")
    _write_norm(to, HIDDEN, weight, eps, outputs=(HIDDEN_OUT,))
    to.save(path, [floats(HIDDEN, 1, "rows", len(weight))], [floats(HIDDEN_OUT, 1, "rows", len(weight))])


def write_head(matrix: Matrix, path: Path, divisor: float = 1.0, cap: float | None = None) -> int:
    """Maps normed rows to logits, and to the ``k`` likeliest tokens with their log-probabilities.

    What the matrix gives is divided by ``divisor``, and kept below ``cap``, as ``cap * tanh(x / cap)``, where there is
    one.

    Returns:
        The bytes that a session takes once it has loaded the file.

    Raises:
        CheckpointError: the matrix does not fit into one file.
    """
    to = Writer("/lm_head")
    num_tokens, hidden_size = matrix.shape
    write_log_probs(to, write_logits(to, matrix, divisor, cap, outputs=(LOGITS,)), TOP_TOKENS)
    outputs = [floats(LOGITS, "rows", num_tokens), floats(TOP_LOG_PROBS, "rows", "top")]
    to.save(
        path,
        [floats(HIDDEN, "rows", hidden_size), integers(TOP_K, 1)],
        [*outputs, integers(TOP_TOKENS, "rows", "top")],
    )
    return matrix.memory_bytes + to.loaded_bytes()


def write_logits(to: Writer, matrix: Matrix, divisor: float, cap: float | None, outputs: tuple[str, ...] = ()) -> str:
    """Add what makes logits of normed rows, as :func:`write_head` has it, and return their name."""
    if divisor == 1.0 and cap is None:
        return matrix.write(to, HIDDEN, outputs=outputs)
    if cap is None:
        return to.add("Div", matrix.write(to, HIDDEN), to.constant(divisor), outputs=outputs)
    capped = to.add("Tanh", to.add("Div", matrix.write(to, HIDDEN), to.constant(divisor * cap)))
    return to.add("Mul", capped, to.constant(cap), outputs=outputs)


def write_log_probs(to: Writer, logits: str, tokens: str) -> str:
    """Add the ``k`` largest log-probabilities of each row, and the columns that they stand in, which get and return the
    name ``tokens``.
    """
    log_probs = to.add("LogSoftmax", logits, axis=-1)
    to.add("TopK", log_probs, TOP_K, outputs=(TOP_LOG_PROBS, tokens), axis=-1, largest=1, sorted=1)
    return tokens


class LayerWriter:
    """Writes one decoder layer of a supported family. Its weights have names that begin with ``prefix``."""

    def __init__(
        self,
        to: Writer,
        prefix: str,
        shape: LayerShape,
        weights: Weights,
        products: dict[str, Product],
        attention: WriteAttention = write_attention,
    ) -> None:
        self.to, self.prefix, self.shape, self.weights, self.products = to, prefix, shape, weights, products
        self._attention = attention

    def write(self, rows: str, layer: int, outputs: tuple[str, ...]) -> str:
        norms = self.shape.norms
        normed = self._norm(norms.before_attention, rows)
        query, key, value = self._products(normed, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        query, key = self._head_norm("self_attn.q_norm", query), self._head_norm("self_attn.k_norm", key)
        attended = self._attention(self.to.within("self_attn"), query, key, value, layer, self.shape)
        attended = self._norm(norms.after_attention, *self._products(attended, "self_attn.o_proj"))
        rows = self.to.add("Add", rows, self._scaled(attended))
        normed = self._norm(norms.before_mlp, rows)
        gate, up = self._products(normed, "mlp.gate_proj", "mlp.up_proj")
        inner = self.to.add("Mul", self._activated(gate), up)
        inner = self._norm(norms.after_mlp, *self._products(inner, "mlp.down_proj"))
        return self.to.add("Add", rows, self._scaled(inner), outputs=outputs)

    def _products(self, rows: str, *names: str) -> list[str]:
        """What these matrices make of the same rows, biases added. They are multiplied as one where they can be one."""
        matrices, found = [self._matrix(name) for name in names], list[str]()
        whole = joined(matrices) if len(names) > 1 else None
        first = len(self.to.nodes)
        parts = [] if whole is None else self._split(whole.write(self.to.within("+".join(names)), rows), matrices)
        for name, matrix in zip(names, matrices, strict=True):
            inner, bias = self.to.within(name), self._floats(f"{name}.bias")
            output, (num_out, num_in) = parts.pop(0) if parts else matrix.write(inner, rows), matrix.shape
            product = Product(rows, num_in, output, num_out, self.to.num_operators(first))
            self.products[f"{self.prefix}.{name}"] = product
            found.append(output if bias is None else inner.add("Add", output, inner.tensor("bias", bias)))
            first = len(self.to.nodes)
        return found

    def _split(self, rows: str, matrices: Sequence[Matrix]) -> list[str]:
        """The outputs of each matrix in those of all."""
        parts = [self.to.new_name() for _ in matrices]
        sizes = self.to.constant([matrix.shape[0] for matrix in matrices])
        self.to.add("Split", rows, sizes, outputs=tuple(parts), axis=-1)
        return parts

    def _matrix(self, name: str) -> Matrix:
        matrix = self.weights[f"{self.prefix}.{name}.weight"]
        assert not isinstance(matrix, np.ndarray), name
        return matrix

    def _activated(self, rows: str) -> str:
        if self.shape.activation == "gelu_tanh":
            return self.to.add("Gelu", rows, approximate="tanh")
        return self.to.add("Mul", rows, self.to.add("Sigmoid", rows))

    def _scaled(self, rows: str) -> str:
        """What is added to the rows that a layer was given."""
        scale = self.shape.residual_scale
        return rows if scale == 1.0 else self.to.add("Mul", rows, self.to.constant(scale))

    def _norm(self, name: str | None, rows: str) -> str:
        """The rows normed, where the family has that norm."""
        if name is None:
            return rows
        weight = self._floats(f"{name}.weight")
        assert weight is not None, name
        return _write_norm(self.to.within(name), rows, weight, self.shape.rms_norm_eps)

    def _head_norm(self, name: str, rows: str) -> str:
        """Norm queries or keys, those of each head by themselves or all, where the family does so."""
        weight = self._floats(f"{name}.weight")
        if weight is None:
            return rows
        inner, head_dim = self.to.within(name), self.shape.head_dim
        if self.shape.qk_norm == "projection":
            return _write_norm(inner, rows, weight, self.shape.rms_norm_eps)
        by_head = inner.add("Reshape", rows, inner.constant([0, 0, -1, head_dim]))  # [1, rows, heads, head_dim]
        normed = _write_norm(inner, by_head, weight, self.shape.rms_norm_eps)
        return inner.add("Reshape", normed, inner.constant([0, 0, -1]))

    def _floats(self, name: str) -> np.ndarray | None:
        found = self.weights.get(f"{self.prefix}.{name}")
        assert found is None or isinstance(found, np.ndarray), name
        return found


def _write_norm(to: Writer, rows: str, weight: np.ndarray, eps: float, outputs: tuple[str, ...] = ()) -> str:
    """``x / rms(x) * weight``, written in the order that ONNX Runtime fuses into one operator."""
    squares = to.add("Pow", rows, to.constant(2.0))
    variance = to.add("Add", to.add("ReduceMean", squares, to.constant([-1]), keepdims=1), to.constant(eps))
    normed = to.add("Div", rows, to.add("Sqrt", variance))
    return to.add("Mul", normed, to.tensor("weight", weight), outputs=outputs)
