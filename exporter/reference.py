"""Computes in numpy what a graph of layers must compute: in float32, or following its products, where these round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from exporter.config import LayerShape
from exporter.layer_graph import Product, Weights
from exporter.matrices import Matrix, float_product
from exporter.steps import Step
from flowspec_edge.manifest import HIDDEN

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
    """Some layers with a cache of their own, one chunk of rows after the other."""

    def __init__(
        self, shape: LayerShape, num_layers: int, weights: Weights, num_slots: int, multiply: Multiply
    ) -> None:
        self.shape, self._weights, self._multiply = shape, weights, multiply
        size = num_slots, shape.num_kv_heads, shape.head_dim
        self._caches = [(np.zeros(size, np.float32), np.zeros(size, np.float32)) for _ in range(num_layers)]

    def run(self, rows: Mapping[str, np.ndarray], step: Step) -> np.ndarray:
        hidden = rows[HIDDEN][0]
        for layer in range(len(self._caches)):
            hidden = self._layer(layer, hidden, step)
        result: np.ndarray = hidden[None]
        return result

    def _layer(self, layer: int, hidden: np.ndarray, step: Step) -> np.ndarray:
        def times(name: str, rows: np.ndarray) -> np.ndarray:
            matrix, bias = self._weights[f"layers.{layer}.{name}.weight"], self._floats(layer, f"{name}.bias")
            assert not isinstance(matrix, np.ndarray), name
            product = self._multiply(f"layers.{layer}.{name}", matrix, rows)
            return product if bias is None else product + bias

        def norm(name: str, rows: np.ndarray) -> np.ndarray:
            weight = self._floats(layer, f"{name}.weight")
            return rows if weight is None else rms_norm(rows, weight, self.shape.rms_norm_eps)

        def by_head(rows: np.ndarray) -> np.ndarray:  # [rows, heads, head_dim]
            return rows.reshape(len(rows), -1, self.shape.head_dim)

        normed = norm("input_layernorm", hidden)
        query = norm("self_attn.q_norm", by_head(times("self_attn.q_proj", normed)))
        key = norm("self_attn.k_norm", by_head(times("self_attn.k_proj", normed)))
        attended = self._attend(layer, query, key, by_head(times("self_attn.v_proj", normed)), step)
        hidden = hidden + times("self_attn.o_proj", attended)
        normed = norm("post_attention_layernorm", hidden)
        gate = times("mlp.gate_proj", normed)
        with np.errstate(over="ignore"):
            gated = gate / (1 + np.exp(-gate))
        result: np.ndarray = hidden + times("mlp.down_proj", gated * times("mlp.up_proj", normed))
        return result

    def _attend(self, layer: int, query: np.ndarray, key: np.ndarray, value: np.ndarray, step: Step) -> np.ndarray:
        """Each row attends to its ancestors and itself: [rows, num_heads * head_dim]."""
        keys, values = self._caches[layer]
        paths = [step.path(row) for row in range(step.first, step.first + len(query))]
        positions = np.array([len(path) - 1 for path in paths])
        chunk = slice(step.first, step.first + len(query))
        keys[chunk], values[chunk] = self._rotate(key, positions), value
        query = self._rotate(query, positions) * np.float32(self.shape.head_dim**-0.5)
        grouped = query.reshape(len(query), self.shape.num_kv_heads, -1, self.shape.head_dim)
        attended = np.empty_like(grouped)
        for number, path in enumerate(paths):
            scores = np.einsum("gqd,sgd->gqs", grouped[number], keys[path], optimize=True)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            attended[number] = np.einsum("gqs,sgd->gqd", weights, values[path], optimize=True)
        return attended.reshape(len(query), -1)

    def _rotate(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Rotary embedding in Llama's half-split layout; ``rows`` is [rows, heads, head_dim]."""
        angles = np.outer(positions.astype(np.float32), np.array(self.shape.rope_frequencies, np.float32))
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        first, second = np.split(rows, 2, axis=-1)
        return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)

    def _floats(self, layer: int, name: str) -> np.ndarray | None:
        found = self._weights.get(f"layers.{layer}.{name}")
        assert found is None or isinstance(found, np.ndarray), name
        return found


def rms_norm(rows: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """``rows / rms(rows) * weight``."""
    normed: np.ndarray = rows / np.sqrt(np.square(rows).mean(axis=-1, keepdims=True) + np.float32(eps)) * weight
    return normed
