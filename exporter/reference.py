"""Computes in numpy what a graph of layers must compute: in float32, or following its products, where these round."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from exporter.config import LayerShape
from exporter.layer_graph import Product, Weights
from exporter.matrices import Matrix, float_product
from exporter.steps import Step
from flowspec_edge.manifest import HIDDEN

Expected = Callable[[np.ndarray], np.ndarray]
"""What a graph without a cache must make of rows."""
Multiply = Callable[[str, Matrix, np.ndarray], np.ndarray]
"""The product of rows, [rows, num_in], by a matrix whose name is given without ``.weight``."""


def in_float32(name: str, matrix: Matrix, rows: np.ndarray) -> np.ndarray:
    return float_product(matrix, rows)


class FollowedProducts:
    """Takes the products of a graph for its own, once each is compared with the same arithmetic.

    A value that lies on the border of two steps may be rounded to either, and what comes after that differs by far more
    than float32 does. So each product is compared for itself: the rows that enter it with those that layers in numpy
    have come to from the product before, and what comes out with what numpy makes of the graph's own rows.

    Attributes:
        error: the largest difference so far, relative to the RMS of what was expected.
    """

    def __init__(self, products: Mapping[str, Product]) -> None:
        self._products = products
        self._steps: list[Mapping[str, np.ndarray]] = []
        self._current: Mapping[str, np.ndarray] = {}
        self._compared: set[str] = set()
        self.error = 0.0

    def show(self, steps: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Take what the graph had in each step, [1, rows, width] by name: rows that are compared, and no others."""
        self._steps = list(steps)

    def begin(self, step: int) -> None:
        """Say which step is to be followed."""
        self._current = self._steps[step]

    def __call__(self, name: str, matrix: Matrix, rows: np.ndarray) -> np.ndarray:
        product = self._products[name]
        if name not in self._compared:  # the rows of all steps at once: a matrix is unpacked for them once
            self._compared.add(name)
            given, output = (np.concatenate([step[key][0] for step in self._steps]) for key in product.names)
            self._compare(output, matrix.times(given))
        self._compare(self._current[product.rows][0], rows)
        following: np.ndarray = self._current[product.output][0]
        return following

    def _compare(self, found: np.ndarray, expected: np.ndarray) -> None:
        error = relative_error([found], [expected])
        self.error = error if not error <= self.error else self.error  # a NaN stays


def relative_error(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Largest absolute difference over all rows, relative to the RMS of the expected ones."""
    difference = max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))
    squares = sum(float(np.square(rows, dtype=np.float64).sum()) for rows in expected)
    return difference / float(np.sqrt(squares / sum(rows.size for rows in expected)))


class Reference(Protocol):
    """Layers or a drafter that keep a cache from step to step."""

    def run(self, rows: Mapping[str, np.ndarray], step: Step) -> np.ndarray:
        """Hidden rows after the layers: [1, rows, hidden_size]."""
        ...


class NumpyLayers:
    """Some layers with a cache of their own, one chunk of rows after the other.

    They compute in ``dtype``, float32 or float64, which rows and what ``multiply`` returns are of. Rows are so many
    ``positions_before`` their depth, but none before position 0.
    """

    def __init__(
        self,
        shape: LayerShape,
        layers: range,
        weights: Weights,
        num_slots: int,
        multiply: Multiply = in_float32,
        dtype: type[np.floating[Any]] = np.float32,
        positions_before: int = 0,
    ) -> None:
        self.shape, self._layers, self._weights, self._multiply, self._dtype = shape, layers, weights, multiply, dtype
        self._positions_before = positions_before
        size = num_slots, shape.num_kv_heads, shape.head_dim
        self._caches = [(np.zeros(size, dtype), np.zeros(size, dtype)) for _ in layers]

    def run(self, rows: Mapping[str, np.ndarray], step: Step) -> np.ndarray:
        hidden = rows[HIDDEN][0]
        if self._layers.start == 0:
            hidden = hidden * np.float32(self.shape.embedding_scale)
        for layer in range(len(self._layers)):
            hidden = self._layer(layer, hidden, step)
        result: np.ndarray = hidden[None]
        return result

    def _layer(self, layer: int, hidden: np.ndarray, step: Step) -> np.ndarray:
        def times(name: str, rows: np.ndarray) -> np.ndarray:
            matrix, bias = self._weights[f"layers.{layer}.{name}.weight"], self._floats(layer, f"{name}.bias")
            assert not isinstance(matrix, np.ndarray), name
            product = self._multiply(f"layers.{layer}.{name}", matrix, rows)
            return product if bias is None else product + bias

        def norm(name: str | None, rows: np.ndarray) -> np.ndarray:
            weight = None if name is None else self._floats(layer, f"{name}.weight")
            return rows if weight is None else rms_norm(rows, weight, self.shape.rms_norm_eps)

        def by_head(rows: np.ndarray) -> np.ndarray:  # [rows, heads, head_dim]
            return rows.reshape(len(rows), -1, shape.head_dim)

        def normed_by_head(name: str, rows: np.ndarray) -> np.ndarray:
            return norm(name, by_head(rows)) if shape.qk_norm == "head" else by_head(norm(name, rows))

        shape = self.shape
        normed = norm(shape.norms.before_attention, hidden)
        query = normed_by_head("self_attn.q_norm", times("self_attn.q_proj", normed))
        key = normed_by_head("self_attn.k_norm", times("self_attn.k_proj", normed))
        attended = self._attend(layer, query, key, by_head(times("self_attn.v_proj", normed)), step)
        attended = norm(shape.norms.after_attention, times("self_attn.o_proj", attended))
        hidden = hidden + attended * np.float32(shape.residual_scale)
        normed = norm(shape.norms.before_mlp, hidden)
        gated = _ACTIVATIONS[shape.activation](times("mlp.gate_proj", normed))
        inner = norm(shape.norms.after_mlp, times("mlp.down_proj", gated * times("mlp.up_proj", normed)))
        result: np.ndarray = hidden + inner * np.float32(shape.residual_scale)
        return result

    def _attend(self, place: int, query: np.ndarray, key: np.ndarray, value: np.ndarray, step: Step) -> np.ndarray:
        """Each row attends to its ancestors and itself, or the last of them: [rows, num_heads * head_dim]."""
        (keys, values), layer, shape = self._caches[place], self._layers[place], self.shape
        num_rows, num_slots = len(query), step.first + len(query)  # rows of padding may have been left out
        seen = step.seen[:num_rows, :num_slots]
        positions = np.maximum(seen.sum(axis=1) - 1 - self._positions_before, 0)
        chunk = slice(step.first, num_slots)
        keys[chunk], values[chunk] = self._rotate(key, positions, layer), value
        query = self._rotate(query, positions, layer) * shape.query_scales(layer)
        grouped = query.reshape(num_rows, shape.num_kv_heads, -1, shape.head_dim)
        if shape.window is not None and layer in shape.sliding_layers:
            seen = seen & (seen[:, ::-1].cumsum(axis=1)[:, ::-1] <= shape.window)
        attended = np.empty_like(grouped)
        for head in range(shape.num_kv_heads):
            scores = grouped[:, head] @ keys[:num_slots, head].T  # [rows, heads that share it, slots]
            if shape.score_cap is not None:
                scores = np.tanh(scores / np.float32(shape.score_cap)) * np.float32(shape.score_cap)
            scores = np.where(seen[:, None], scores, np.float32(-np.inf))
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            attended[:, head] = weights @ values[:num_slots, head]
        return attended.reshape(num_rows, -1)

    def _rotate(self, rows: np.ndarray, positions: np.ndarray, layer: int) -> np.ndarray:
        """Rotary embedding in Llama's half-split layout; ``rows`` is [rows, heads, head_dim]."""
        if layer in self.shape.unrotated_layers:
            return rows
        frequencies = self.shape.ropes[-1 if layer in self.shape.sliding_layers else 0]
        angles = np.outer(positions.astype(self._dtype), np.array(frequencies, np.float32))
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        first, second = np.split(rows, 2, axis=-1)
        return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)

    def _floats(self, layer: int, name: str) -> np.ndarray | None:
        found = self._weights.get(f"layers.{layer}.{name}")
        assert found is None or isinstance(found, np.ndarray), name
        return found


def finished_logits(shape: LayerShape, logits: np.ndarray) -> np.ndarray:
    """The logits from what the output matrix gives."""
    finished: np.ndarray = logits / np.float32(shape.logit_divisor)
    if shape.logit_cap is not None:
        finished = np.tanh(finished / np.float32(shape.logit_cap)) * np.float32(shape.logit_cap)
    return finished


def silu(rows: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        activated: np.ndarray = rows / (1 + np.exp(-rows))
    return activated


def gelu_tanh(rows: np.ndarray) -> np.ndarray:
    inner = np.float32(math.sqrt(2 / math.pi)) * (rows + np.float32(0.044715) * rows**3)
    activated: np.ndarray = np.float32(0.5) * rows * (1 + np.tanh(inner))
    return activated


_ACTIVATIONS = {"silu": silu, "gelu_tanh": gelu_tanh}


def rms_norm(rows: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """``rows / rms(rows) * weight``."""
    normed: np.ndarray = rows / np.sqrt(np.square(rows).mean(axis=-1, keepdims=True) + np.float32(eps)) * weight
    return normed
