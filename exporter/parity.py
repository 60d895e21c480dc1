"""Compares exported graphs with a reference, in numpy or (of draft heads) in torch, on rows of real text.

Graphs are run here just as a device runs them, and past and present are one buffer. In the cache of a drafter slot 0 is
always masked, so that the fused operator always has a past (without one it ignores position ids).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime

from exporter.config import LayerShape
from exporter.reference import Expected, FollowedProducts, Reference, relative_error
from exporter.steps import Step, rotary_inputs, step_inputs
from flowspec_edge.errors import ParityError
from flowspec_edge.manifest import (
    ATTENTION_BIAS,
    FEATURE,
    HIDDEN,
    HIDDEN_OUT,
    LOGITS,
    PAST_KEY,
    PAST_VALUE,
    PRESENT_KEY,
    PRESENT_VALUE,
    SESSION_SETTINGS,
    TOKEN_EMBEDDING,
    TOP_K,
    TOP_LOG_PROBS,
    TOP_TOKENS,
)


class OnnxGraph:
    """An exported block or drafter on ONNX Runtime, its caches updated in place."""

    def __init__(self, path: Path, num_slots: int, shape: LayerShape) -> None:
        self.session = open_session(path)
        self.shape, self.num_slots = shape, -(-num_slots // 128) * 128
        self._caches: dict[str, onnxruntime.OrtValue] = {}
        self._memory: list[np.ndarray] = []
        self._rotary = rotary_inputs(shape, self.num_slots)
        self._is_fused = False
        cached = f"{PRESENT_KEY}.", f"{PRESENT_VALUE}."
        self._outputs = [name for out in self.session.get_outputs() if not (name := out.name).startswith(cached)]
        for graph_input in self.session.get_inputs():
            self._is_fused |= graph_input.name == ATTENTION_BIAS
            if graph_input.name.startswith((f"{PAST_KEY}.", f"{PAST_VALUE}.")):
                first, second, _, size = graph_input.shape
                cache = np.zeros((first, second, self.num_slots, size), dtype=np.float32)
                self._memory.append(cache)
                self._caches[graph_input.name] = onnxruntime.OrtValue.ortvalue_from_numpy(cache)

    def run(self, rows: Mapping[str, np.ndarray], step: Step) -> np.ndarray:
        """Hidden rows after the graph: [1, rows, hidden_size]."""
        return self.run_all(rows, step)[HIDDEN_OUT]

    def run_all(self, rows: Mapping[str, np.ndarray], step: Step) -> dict[str, np.ndarray]:
        """All that the graph has as outputs, caches aside."""
        binding = self.session.io_binding()
        inputs = step_inputs(step, rows, self.shape, self.num_slots, is_fused=self._is_fused)
        for name, array in {**rows, **self._rotary, **inputs}.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, cache in self._caches.items():
            binding.bind_ortvalue_input(name, cache)
            present = name.replace(PAST_KEY, PRESENT_KEY).replace(PAST_VALUE, PRESENT_VALUE)
            binding.bind_ortvalue_output(present, cache)
        for name in self._outputs:
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        found = binding.get_outputs()[-len(self._outputs) :]
        return {name: value.numpy() for name, value in zip(self._outputs, found, strict=True)}

    def forget(self) -> None:
        """Empty the caches."""
        for cache in self._memory:
            cache.fill(0.0)


@dataclass
class ChainCheck:
    """Takes the rows of the probe text from block to block, once as they are expected and once through the graphs.

    ``tolerance`` is the largest error of one block and of the head, ``drafter_tolerance`` that of a drafter, and
    ``chain_tolerance`` that of the whole chain.
    """

    steps: list[Step]
    embedding: np.ndarray  # [vocab_size, hidden_size]
    tolerance: float
    drafter_tolerance: float
    chain_tolerance: float
    reference: str
    block_errors: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.expected = [self.embed(step) for step in self.steps]
        self.chained = list(self.expected)

    @property
    def capacity(self) -> int:
        """Slots of a cache: one more than are used, so that it is not full at the end."""
        return max(step.num_slots for step in self.steps) + 1

    @property
    def num_rows(self) -> int:
        return sum(step.num_compared for step in self.steps)

    def embed(self, step: Step) -> np.ndarray:
        rows: np.ndarray = self.embedding[step.tokens].astype(np.float32)[None]  # [1, rows, hidden_size]
        return rows

    def check_block(self, reference: Reference, shape: LayerShape, path: Path, layers: str) -> None:
        """Compare one block on the reference's rows, and take the reference's and the graphs' rows through it."""
        graph = OnnxGraph(path, self.capacity, shape)
        found = [graph.run({HIDDEN: rows}, step) for rows, step in zip(self.expected, self.steps, strict=True)]
        graph.forget()
        chained = zip(self.chained, self.steps, strict=True)
        self.chained = [graph.run({HIDDEN: rows}, step) for rows, step in chained]
        expected = zip(self.expected, self.steps, strict=True)
        self.expected = [reference.run({HIDDEN: rows}, step) for rows, step in expected]
        error = self._error(found, self.expected)
        self.block_errors.append(error)
        self._enforce(f"{path.parent.name}/{path.name}: layers {layers}", error)

    def check_products(
        self, reference: Reference, followed: FollowedProducts, shape: LayerShape, path: Path, shown: Path, layers: str
    ) -> None:
        """Compare one block whose products round activations.

        ``shown`` is the same graph as ``path``, with its products among its outputs, which ``reference`` follows. That
        the two compute the same is seen in the chain, which goes through ``path`` while what is expected goes through
        ``shown``.
        """
        graph = OnnxGraph(shown, self.capacity, shape)
        steps = [
            {**graph.run_all({HIDDEN: rows}, step), HIDDEN: rows}
            for rows, step in zip(self.expected, self.steps, strict=True)
        ]
        compared = [
            {name: self._compared(rows, step) for name, rows in arrays.items()}
            for arrays, step in zip(steps, self.steps, strict=True)
        ]
        del graph  # the block is in memory once, and its weights where they came from
        followed.show(compared)
        last = []
        for number, (arrays, step) in enumerate(zip(compared, self.steps, strict=True)):
            followed.begin(number)
            last.append(reference.run({HIDDEN: arrays[HIDDEN]}, step))
        error = relative_error([arrays[HIDDEN_OUT] for arrays in compared], last)
        shipped = OnnxGraph(path, self.capacity, shape)
        chained = zip(self.chained, self.steps, strict=True)
        self.chained = [shipped.run({HIDDEN: rows}, step) for rows, step in chained]
        self.expected = [arrays[HIDDEN_OUT] for arrays in steps]
        self.block_errors.append(max(error, followed.error))
        self._enforce(f"{path.parent.name}/{path.name}: layers {layers}", self.block_errors[-1])

    def check_final_norm(self, norm: Expected, path: Path) -> float:
        """Take the rows through the final norm, and return the error of the whole chain."""
        session = open_session(path)
        self.expected = [norm(rows) for rows in self.expected]
        self.chained = [session.run([HIDDEN_OUT], {HIDDEN: rows})[0] for rows in self.chained]
        error = self._error(self.chained, self.expected)
        self._enforce("the whole chain of blocks and the final norm", error, self.chain_tolerance)
        return error

    def check_head(self, logits_of: Expected, path: Path, top: int = 8) -> float:
        """Compare logits on the reference's normed rows, and the graph's log-probabilities with its own logits."""
        rows = np.concatenate(
            [self._compared(rows, step)[0] for rows, step in zip(self.expected, self.steps, strict=True)]
        )
        k = np.array([min(top, self.embedding.shape[0])], dtype=np.int64)
        logits, log_probs, tokens = open_session(path).run(
            [LOGITS, TOP_LOG_PROBS, TOP_TOKENS], {HIDDEN: rows, TOP_K: k}
        )
        error = relative_error([logits], [logits_of(rows)])
        self._enforce(f"{path.name}: the head", error)
        difference = float(np.abs(np.take_along_axis(log_softmax(logits), tokens, axis=-1) - log_probs).max())
        if difference > 1e-4 or np.any(np.diff(log_probs, axis=-1) > 0):
            raise ParityError(
                f"{path.name}: {TOP_LOG_PROBS} differ from the log-softmax of {LOGITS} by {difference:.2e}"
            )
        return error

    def check_drafter(self, reference: Reference, shape: LayerShape, path: Path) -> float:
        """Compare the drafter on pairs of a token and its parent's feature, at the parent's position."""
        graph = OnnxGraph(path, self.capacity, shape)
        features = np.concatenate([rows[0] for rows in self.expected])  # [all rows, hidden_size]
        found, expected = [], []
        for step in self.steps:
            parents = np.maximum(step.parents_of_rows(), 0)
            rows = {TOKEN_EMBEDDING: self.embed(step), FEATURE: features[parents][None]}
            found.append(graph.run(rows, step))
            expected.append(reference.run(rows, step))
        error = self._error(found, expected)
        self._enforce_drafter(f"{path.name}: the drafter", error)
        return error

    def check_fuse(self, fused: Expected, path: Path, num_taps: int) -> float:
        """Compare the graph that fuses tapped rows; each of the reference's normed rows stands for all of a token's."""
        rows = np.concatenate([np.concatenate([rows] * num_taps, axis=-1) for rows in self.expected], axis=1)
        error = relative_error([open_session(path).run([HIDDEN_OUT], {HIDDEN: rows})[0]], [fused(rows)])
        self._enforce_drafter(f"{path.name}: the fuse", error)
        return error

    def check_top(self, log_probs_of: Callable[[np.ndarray, int], np.ndarray], path: Path, num_tokens: int) -> float:
        """Compare the log-probabilities of EAGLE-3's own head, which has no logits among its outputs."""
        rows = np.concatenate([rows[0] for rows in self.expected])
        top = min(8, num_tokens)
        found = open_session(path).run([TOP_LOG_PROBS], {HIDDEN: rows, TOP_K: np.array([top])})[0]
        error = relative_error([found], [log_probs_of(rows, top)])
        self._enforce_drafter(f"{path.name}: the drafter's head", error)
        return error

    def _compared(self, rows: np.ndarray, step: Step) -> np.ndarray:
        return rows[:, : step.num_compared]

    def _error(self, found: list[np.ndarray], expected: list[np.ndarray]) -> float:
        return relative_error(
            [self._compared(rows, step) for rows, step in zip(found, self.steps, strict=True)],
            [self._compared(rows, step) for rows, step in zip(expected, self.steps, strict=True)],
        )

    def _enforce(self, what: str, error: float, tolerance: float | None = None) -> None:
        _check_error(what, error, self.reference, self.tolerance if tolerance is None else tolerance)

    def _enforce_drafter(self, what: str, error: float) -> None:
        _check_error(what, error, "float32", self.drafter_tolerance)


def _check_error(what: str, error: float, reference: str, limit: float) -> None:
    if not error <= limit:  # a NaN fails too
        raise ParityError(f"{what}: error {error:.2e} against {reference} exceeds the tolerance {limit:.0e}")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Of each row, in float32."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """A CPU session on all cores that this process may use."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    options.log_severity_level = 3
    for setting in SESSION_SETTINGS:
        options.add_session_config_entry(*setting)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
