"""Compares exported graphs with torch on rows of real text: a chain in two chunks, a branching tree, and a single row
with padding.

Graphs are run here just as a device runs them, and past and present are one buffer. In the cache of a drafter slot 0 is
always masked, so that the fused operator always has a past (without one it ignores position ids).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from exporter.config import LayerShape
from exporter.eagle3 import DraftTop, Fuse
from exporter.stage_module import Block, FinalNorm, FusedBlock, Head, rotary_tables
from flowspec_edge.core.limits import RECENT_ROWS
from flowspec_edge.engine.attention_inputs import attention_inputs
from flowspec_edge.engine.padding import attention_padding
from flowspec_edge.errors import ParityError
from flowspec_edge.manifest import (
    ATTENTION_BIAS,
    ATTENTION_PADDING,
    FEATURE,
    HIDDEN,
    HIDDEN_OUT,
    LOGITS,
    PAST_KEY,
    PAST_VALUE,
    POSITION_IDS,
    PRESENT_KEY,
    PRESENT_VALUE,
    ROTARY_COS,
    ROTARY_SIN,
    SEQLENS_K,
    SESSION_SETTINGS,
    TOKEN_EMBEDDING,
    TOP_K,
    TOP_LOG_PROBS,
    TOP_TOKENS,
    TOTAL_LENGTH,
)

# Added to a score that must not count: exp(MASKED + score) is exactly 0 in float32 for any score below 1e8.
MASKED = -1e9

NUM_CHAIN_ROWS = 64
# Parent of each tree row, counted from the tree's first row; -1 is the last row of the chain.
TREE_PARENTS = (-1, 0, 0, 0, 1, 1, 2, 4, 4, 6, 7, 9)
SINGLE_PARENT = 10
DRAFTER_SLACK = 2.0
"""A drafter's error may be this many times the tolerance of a block, for it changes no text. The demo model's drafter
has 0.77 in w8a8, where the tolerance is 0.5.
"""

# Any text would do; code is what the demo model knows, and every tokenizer has tokens for it.
PROBE_TEXT = '''\
class Inventory:
    """Counts things by name, and says what is running low."""

    def __init__(self, limits):
        self.limits = dict(limits)
        self.counts = {}

    def add(self, name, number=1):
        if number < 0:
            raise ValueError("number must not be negative: %r" % number)
        self.counts[name] = self.counts.get(name, 0) + number
        return self.counts[name]

    def low(self):
        for name, limit in sorted(self.limits.items()):
            if self.counts.get(name, 0) < limit:
                yield name
'''

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Step:
    """One forward: a chunk of rows, of which those from ``num_compared`` on are padding.

    Rows are numbered from the first step on. ``parents`` has that of each row up to the last one of the chunk and of
    ``num_fused_padding`` rows behind it, which the fused operator needs; -1 is the parent of the very first row.
    """

    tokens: np.ndarray  # int64 [rows]
    parents: list[int]
    num_compared: int
    num_fused_padding: int

    @property
    def first(self) -> int:
        """The number of the chunk's first row."""
        return len(self.parents) - self.num_fused_padding - self.num_compared

    @property
    def num_slots(self) -> int:
        """Slots in use after this step, padding included; slot 0 of a drafter's cache is one of them."""
        return max(len(self.parents), self.first + len(self.tokens)) + 1

    def path(self, row: int) -> list[int]:
        """The ancestors of a row and the row itself, in order of depth; a row of padding is its only one."""
        path = [row]
        while row < len(self.parents) and self.parents[path[-1]] >= 0:
            path.append(self.parents[path[-1]])
        return path[::-1]

    def parents_of_rows(self) -> np.ndarray:
        """The parent of each row of the chunk, int64 [rows]."""
        rows = range(self.first, self.first + len(self.tokens))
        return np.array([self.parents[row] if row < len(self.parents) else row for row in rows])

    def inputs(self, shape: LayerShape, num_slots: int) -> Arrays:
        """The inputs of a layer block with a cache of ``num_slots``: row ``r`` is in slot ``r``."""
        paths = [self.path(row) for row in range(self.first, self.first + len(self.tokens))]
        recent = np.array([([path[-1]] * RECENT_ROWS + path)[-RECENT_ROWS:] for path in paths])
        positions = np.array([len(path) - 1 for path in paths])
        heads = {"num_heads": shape.num_heads, "num_kv_heads": shape.num_kv_heads}
        return attention_inputs(self.first, positions, recent, num_slots=num_slots, **heads)

    def fused_inputs(self, shift: int) -> Arrays:
        """The inputs of a graph with the fused operator: row ``r`` is in slot ``r + 1``, ``shift`` positions early."""
        bias = ancestor_bias(self.parents, self.first, len(self.parents))
        num_rows, total = bias.shape[2:]
        positions = np.array([len(self.path(row)) - 1 - shift for row in range(self.first, len(self.parents))])
        return {
            ATTENTION_PADDING: np.array([0, num_rows - len(self.tokens)]),
            ATTENTION_BIAS: bias,
            POSITION_IDS: np.maximum(positions, 0)[None],
            SEQLENS_K: np.array([total - 1], dtype=np.int32),
            TOTAL_LENGTH: np.array(total, dtype=np.int32),
        }


def probe_steps(token_ids: Sequence[int], max_context: int, min_rows: int) -> list[Step]:
    """The rows that every graph is compared on, in chunks of at least ``min_rows``.

    ``token_ids`` are repeated where they are too few.
    """
    deepest = 1 + max(_depth(row) for row in range(len(TREE_PARENTS))) + 1
    num_chain = min(NUM_CHAIN_ROWS, max(max_context - deepest, 2))
    parents = [*range(-1, num_chain - 1), *(num_chain + parent for parent in TREE_PARENTS)]
    parents.append(num_chain + SINGLE_PARENT)
    cuts = [0, num_chain * 5 // 8, num_chain, len(parents) - 1, len(parents)]
    return [_step(token_ids, parents, start, stop, min_rows) for start, stop in itertools.pairwise(cuts)]


def chain_steps(token_ids: Sequence[int], num_rows: int) -> list[Step]:
    """A plain text in chunks of ``num_rows``. A last chunk of one row gets no padding for the matrix products."""
    parents = list(range(-1, len(token_ids) - 1))
    starts = range(0, len(token_ids), num_rows)
    return [_step(token_ids, parents, start, min(start + num_rows, len(parents)), min_rows=1) for start in starts]


def ancestor_bias(parents: Sequence[int], start: int, stop: int) -> np.ndarray:
    """Bias of the rows ``[start, stop)``: 0 for a row and its ancestors, else MASKED.

    Row ``r`` is in slot ``r + 1``.
    """
    bias = np.full((1, 1, stop - start, stop + 1), MASKED, dtype=np.float32)  # [1, 1, rows, total]
    for row in range(start, stop):
        ancestor = row
        while ancestor >= 0:
            bias[0, 0, row - start, ancestor + 1] = 0.0
            ancestor = parents[ancestor]
    return bias


class OnnxGraph:
    """An exported block or drafter on ONNX Runtime, its caches updated in place."""

    def __init__(self, path: Path, num_slots: int, shape: LayerShape) -> None:
        self.session = open_session(path)
        self.shape, self.num_slots = shape, -(-num_slots // 128) * 128
        self._caches: dict[str, onnxruntime.OrtValue] = {}
        self._memory: list[np.ndarray] = []
        self._rotary = _rotary_inputs(shape, self.num_slots)
        self._is_fused = False
        for graph_input in self.session.get_inputs():
            self._is_fused |= graph_input.name == ATTENTION_BIAS
            if graph_input.name.startswith((f"{PAST_KEY}.", f"{PAST_VALUE}.")):
                first, second, _, size = graph_input.shape
                cache = np.zeros((first, second, self.num_slots, size), dtype=np.float32)
                self._memory.append(cache)
                self._caches[graph_input.name] = onnxruntime.OrtValue.ortvalue_from_numpy(cache)

    def run(self, rows: Mapping[str, np.ndarray], step: Step) -> np.ndarray:
        """Hidden rows after the graph: [1, rows, hidden_size]."""
        binding = self.session.io_binding()
        inputs = _inputs(step, rows, self.shape, self.num_slots, is_fused=self._is_fused)
        for name, array in {**rows, **self._rotary, **inputs}.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, cache in self._caches.items():
            binding.bind_ortvalue_input(name, cache)
            present = name.replace(PAST_KEY, PRESENT_KEY).replace(PAST_VALUE, PRESENT_VALUE)
            binding.bind_ortvalue_output(present, cache)
        binding.bind_output(HIDDEN_OUT)
        self.session.run_with_iobinding(binding)
        hidden: np.ndarray = binding.get_outputs()[-1].numpy()
        return hidden


class TorchGraph:
    """The torch module of a block or drafter, run through the same steps."""

    def __init__(self, module: Block, num_slots: int) -> None:
        self.module = module
        self._num_slots = num_slots
        shape, self._is_fused = module.shape, isinstance(module, FusedBlock)
        outer = (1, shape.num_kv_heads) if self._is_fused else (shape.num_kv_heads, 1)
        self._layers = range(module.start, module.stop)
        self._keys = [torch.zeros(*outer, num_slots, shape.head_dim) for _ in self._layers]
        width = shape.head_dim + (not self._is_fused)
        self._values = [torch.zeros(*outer, num_slots, width) for _ in self._layers]
        self._rotary = _rotary_inputs(shape, num_slots)

    def run(self, rows: Mapping[str, np.ndarray], step: Step) -> np.ndarray:
        inputs = _inputs(step, rows, self.module.shape, self._num_slots, is_fused=self._is_fused)
        arrays = {**rows, **self._rotary, **inputs}
        given = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
        with torch.no_grad():
            outputs = self.module(**given, past_key=self._keys, past_value=self._values)
        self._keys = [outputs[f"{PRESENT_KEY}.{i}"] for i in self._layers]
        self._values = [outputs[f"{PRESENT_VALUE}.{i}"] for i in self._layers]
        hidden: np.ndarray = outputs[HIDDEN_OUT].numpy()
        return hidden


@dataclass
class ChainCheck:
    """Takes the rows of the probe text from block to block, once through torch and once through the exported graphs.

    ``tolerance`` is the largest error of one block. The error of the whole chain is held against it only where
    ``judges_chain`` is set.
    """

    steps: list[Step]
    embedding: np.ndarray  # [vocab_size, hidden_size]
    tolerance: float
    judges_chain: bool = True
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

    def check_block(self, module: Block, path: Path) -> None:
        """Compare one block on torch's rows, and take torch's and the graphs' rows through it."""
        reference = TorchGraph(module, self.capacity)
        alone, chained = (OnnxGraph(path, self.capacity, module.shape) for _ in range(2))
        found, expected = [], []
        for i, step in enumerate(self.steps):
            found.append(alone.run({HIDDEN: self.expected[i]}, step))
            self.chained[i] = chained.run({HIDDEN: self.chained[i]}, step)
            expected.append(reference.run({HIDDEN: self.expected[i]}, step))
        self.expected = expected
        error = self._error(found, expected)
        self.block_errors.append(error)
        self._enforce(f"{path.parent.name}/{path.name}: layers [{module.start}, {module.stop})", error)

    def check_final_norm(self, module: FinalNorm, path: Path) -> float:
        """Take the rows through the final norm, and return the error of the whole chain."""
        session = open_session(path)
        with torch.no_grad():
            self.expected = [module(torch.from_numpy(rows))[HIDDEN_OUT].numpy() for rows in self.expected]
        self.chained = [session.run([HIDDEN_OUT], {HIDDEN: rows})[0] for rows in self.chained]
        error = self._error(self.chained, self.expected)
        if self.judges_chain:
            self._enforce("the whole chain of blocks and the final norm", error)
        return error

    def check_head(self, module: Head, path: Path, top: int = 8) -> float:
        """Compare logits on torch's normed rows, and the graph's log-probabilities with its own logits."""
        rows = np.concatenate(
            [self._compared(rows, step)[0] for rows, step in zip(self.expected, self.steps, strict=True)]
        )
        k = np.array([min(top, self.embedding.shape[0])], dtype=np.int64)
        logits, log_probs, tokens = open_session(path).run(
            [LOGITS, TOP_LOG_PROBS, TOP_TOKENS], {HIDDEN: rows, TOP_K: k}
        )
        with torch.no_grad():
            expected = module(torch.from_numpy(rows), torch.from_numpy(k))[LOGITS].numpy()
        error = relative_error([logits], [expected])
        self._enforce(f"{path.name}: the head", error)
        own = torch.from_numpy(logits).log_softmax(dim=-1).numpy()
        difference = float(np.abs(np.take_along_axis(own, tokens, axis=-1) - log_probs).max())
        if difference > 1e-4 or np.any(np.diff(log_probs, axis=-1) > 0):
            raise ParityError(
                f"{path.name}: {TOP_LOG_PROBS} differ from the log-softmax of {LOGITS} by {difference:.2e}"
            )
        return error

    def check_drafter(self, module: FusedBlock, path: Path) -> float:
        """Compare the drafter on pairs of a token and its parent's feature, at the parent's position."""
        reference, graph = TorchGraph(module, self.capacity), OnnxGraph(path, self.capacity, module.shape)
        features = np.concatenate([rows[0] for rows in self.expected])  # [all rows, hidden_size]
        found, expected = [], []
        for step in self.steps:
            parents = np.maximum(step.parents_of_rows(), 0)
            rows = {TOKEN_EMBEDDING: self.embed(step), FEATURE: features[parents][None]}
            found.append(graph.run(rows, step))
            expected.append(reference.run(rows, step))
        error = self._error(found, expected)
        self._enforce(f"{path.name}: the drafter", error, slack=DRAFTER_SLACK)
        return error

    def check_fuse(self, module: Fuse, path: Path) -> float:
        """Compare the graph that fuses tapped rows; each of torch's normed rows stands for all three of its inputs."""
        rows = np.concatenate([np.concatenate([rows] * 3, axis=-1) for rows in self.expected], axis=1)
        with torch.no_grad():
            expected = module(torch.from_numpy(rows))[HIDDEN_OUT].numpy()
        error = relative_error([open_session(path).run([HIDDEN_OUT], {HIDDEN: rows})[0]], [expected])
        self._enforce(f"{path.name}: the fuse", error)
        return error

    def check_top(self, module: DraftTop, path: Path, top: int = 8) -> float:
        """Compare the log-probabilities of EAGLE-3's own head, which has no logits among its outputs."""
        rows = np.concatenate([rows[0] for rows in self.expected])
        k = np.array([min(top, module.lm_head.out_features)], dtype=np.int64)
        found = open_session(path).run([TOP_LOG_PROBS], {HIDDEN: rows, TOP_K: k})[0]
        with torch.no_grad():
            expected = module(torch.from_numpy(rows), torch.from_numpy(k))[TOP_LOG_PROBS].numpy()
        error = relative_error([found], [expected])
        self._enforce(f"{path.name}: the drafter's head", error)
        return error

    def _compared(self, rows: np.ndarray, step: Step) -> np.ndarray:
        return rows[:, : step.num_compared]

    def _error(self, found: list[np.ndarray], expected: list[np.ndarray]) -> float:
        return relative_error(
            [self._compared(rows, step) for rows, step in zip(found, self.steps, strict=True)],
            [self._compared(rows, step) for rows, step in zip(expected, self.steps, strict=True)],
        )

    def _enforce(self, what: str, error: float, slack: float = 1.0) -> None:
        tolerance = slack * self.tolerance
        if not error <= tolerance:  # a NaN fails too
            raise ParityError(f"{what}: error {error:.2e} against torch exceeds the tolerance {tolerance:.0e}")


def relative_error(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Largest absolute difference over all rows, relative to the RMS of the expected ones."""
    difference = max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))
    rms = float(np.sqrt(np.mean(np.square(np.concatenate([rows.ravel() for rows in expected], dtype=np.float64)))))
    return difference / rms


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """A CPU session with as many threads as torch uses."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    for setting in SESSION_SETTINGS:
        options.add_session_config_entry(*setting)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _inputs(step: Step, rows: Mapping[str, np.ndarray], shape: LayerShape, num_slots: int, *, is_fused: bool) -> Arrays:
    """A drafter's rows are at the positions of their parents."""
    return step.fused_inputs(shift=int(FEATURE in rows)) if is_fused else step.inputs(shape, num_slots)


def _rotary_inputs(shape: LayerShape, capacity: int) -> Arrays:
    cos, sin = rotary_tables(shape, capacity)
    return {ROTARY_COS: cos.numpy(), ROTARY_SIN: sin.numpy()}


def _step(token_ids: Sequence[int], parents: Sequence[int], start: int, stop: int, min_rows: int) -> Step:
    """The rows ``[start, stop)``, padded as the engine pads them: each row of padding is a child of the row before it
    for the fused operator, and by itself in a block.
    """
    num_padding = attention_padding(stop - start, stop + 1)
    rows = range(start, max(stop, start + min_rows))
    return Step(
        tokens=np.array([token_ids[row % len(token_ids)] for row in rows], dtype=np.int64),
        parents=[*parents[:stop], *range(stop - 1, stop - 1 + num_padding)],
        num_compared=stop - start,
        num_fused_padding=num_padding,
    )


def _depth(row: int) -> int:
    """How many rows of the probe tree are above this one."""
    parent = TREE_PARENTS[row]
    return 0 if parent < 0 else 1 + _depth(parent)
