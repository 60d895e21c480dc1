"""Writes an EAGLE-3 head's torch modules as ONNX files and checks them, by optimum's export and validation."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from optimum.exporters.onnx import export, validate_model_outputs
from optimum.exporters.onnx.base import OnnxConfig
from optimum.exporters.onnx.convert import AtolError, OutputMatchError, ShapeError
from optimum.utils import NormalizedConfig
from torch import nn

from exporter.config import LayerShape
from exporter.eagle3 import DraftTop, Fuse
from exporter.steps import rotary_inputs
from flowspec_edge.errors import ParityError
from flowspec_edge.manifest import (
    ATTENTION_BIAS,
    ATTENTION_PADDING,
    FEATURE,
    HIDDEN,
    HIDDEN_OUT,
    PAST_KEY,
    PAST_VALUE,
    POSITION_IDS,
    PRESENT_KEY,
    PRESENT_VALUE,
    ROTARY_COS,
    ROTARY_SIN,
    SEQLENS_K,
    TOKEN_EMBEDDING,
    TOP_K,
    TOP_LOG_PROBS,
    TOP_TOKENS,
    TOTAL_LENGTH,
)

OPSET = 18
ROWS_IN = TOKEN_EMBEDDING, FEATURE
# Float32 graphs on random inputs of magnitude one: operator order alone differs (at most 1e-5 seen).
VALIDATION_TOLERANCE = 1e-4

Axes = dict[str, dict[int, str]]
Dummies = dict[str, Any]


@dataclass(frozen=True)
class GraphSpec:
    """Names and dynamic axes of one graph, and example inputs to trace and validate it with."""

    inputs: Axes
    outputs: Axes
    make_dummies: Callable[[], Dummies]


class GraphOnnxConfig(OnnxConfig):  # type: ignore[misc]  # optimum has no types
    """Tells optimum about a graph by its :class:`GraphSpec` instead of by a transformers model type."""

    NORMALIZED_CONFIG_CLASS = NormalizedConfig
    DUMMY_INPUT_GENERATOR_CLASSES: ClassVar[tuple[type, ...]] = ()
    ATOL_FOR_VALIDATION = VALIDATION_TOLERANCE

    def __init__(self, config: Any, spec: GraphSpec) -> None:
        super().__init__(config, task="feature-extraction")
        self.spec = spec

    @property
    def inputs(self) -> Axes:
        return self.spec.inputs

    @property
    def outputs(self) -> Axes:
        return self.spec.outputs

    def generate_dummy_inputs(self, framework: str = "pt", **_: Any) -> Dummies:
        dummies = self.spec.make_dummies()
        if framework == "pt":
            return dummies
        return {
            name: [part.numpy() for part in value] if isinstance(value, list) else value.numpy()
            for name, value in dummies.items()
        }

    def flatten_output_collection_property(self, name: str, field: Iterable[Any]) -> dict[str, Any]:
        return {f"{name}.{i}": part for i, part in enumerate(field)}


def drafter_spec(shape: LayerShape) -> GraphSpec:
    """The spec of a layer with the fused operator that reads an embedding and a feature."""
    cache = {2: "capacity"}
    inputs: Axes = {name: {1: "rows"} for name in ROWS_IN}
    inputs |= {ATTENTION_PADDING: {}, ROTARY_COS: {0: "positions"}, ROTARY_SIN: {0: "positions"}}
    inputs[ATTENTION_BIAS] = {2: "attention_rows", 3: "total"}
    inputs |= {POSITION_IDS: {1: "attention_rows"}, SEQLENS_K: {}, TOTAL_LENGTH: {}}
    inputs |= {f"{PAST_KEY}.0": cache, f"{PAST_VALUE}.0": cache}
    outputs: Axes = {HIDDEN_OUT: {1: "rows"}, f"{PRESENT_KEY}.0": cache, f"{PRESENT_VALUE}.0": cache}
    return GraphSpec(inputs, outputs, lambda: _dummies(shape))


def top_spec(top: DraftTop) -> GraphSpec:
    """The spec of EAGLE-3's own head."""
    hidden_size = top.lm_head.in_features
    outputs: Axes = {TOP_LOG_PROBS: {0: "rows", 1: "top"}, TOP_TOKENS: {0: "rows", 1: "top"}}
    dummies = {HIDDEN: _random(3, hidden_size), TOP_K: torch.tensor([4])}
    return GraphSpec({HIDDEN: {0: "rows"}, TOP_K: {}}, outputs, lambda: dummies)


def fuse_spec(fuse: Fuse) -> GraphSpec:
    size = fuse.fc.in_features
    return GraphSpec({HIDDEN: {1: "rows"}}, {HIDDEN_OUT: {1: "rows"}}, lambda: {HIDDEN: _random(1, 3, size)})


def export_graph(module: nn.Module, spec: GraphSpec, path: Path) -> None:
    """Write ``module`` to ``path`` as opset 18 and let optimum compare it with torch on random inputs.

    Where weights exceed 2 GiB they are in files beside it.

    Raises:
        ParityError: optimum found an output that differs.
    """
    config = GraphOnnxConfig(module.config, spec)
    for name in ("optimum", "torch.onnx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # Tracing is wanted here; on every export torch warns of its successor and of each size that it freezes.
        warnings.simplefilter("ignore")
        export(module, config, path, opset=OPSET)
        try:
            validate_model_outputs(config, module, path, list(spec.outputs), use_subprocess=False)
        except (AtolError, OutputMatchError, ShapeError) as cause:
            summary = " ".join(str(cause).split())
            raise ParityError(f"{path.name}: the exported graph differs from torch ({summary})") from cause


def _dummies(shape: LayerShape) -> Dummies:
    """Inputs of three rows after four slots in use, row 2 being row 1's sibling, and of one row of padding.

    The cache is full: where past and present are not one buffer, the operator leaves slots above the total undefined.
    """
    rows, attention_rows, total = 3, 4, 8
    bias = torch.zeros(1, 1, attention_rows, total)
    bias[0, 0, 2, total - 3] = -1e9
    bias[..., 0] = -1e9
    dummies: Dummies = {name: _random(1, rows, shape.hidden_size) for name in ROWS_IN}
    dummies[ATTENTION_PADDING] = torch.tensor([0, attention_rows - rows])
    dummies[ATTENTION_BIAS] = bias
    dummies[POSITION_IDS] = torch.tensor([[0, 1, 1, 0]]) + min(3, max(shape.max_context - 2, 0))
    dummies[SEQLENS_K] = torch.tensor([total - 1], dtype=torch.int32)
    dummies[TOTAL_LENGTH] = torch.tensor(total, dtype=torch.int32)
    dummies |= {name: torch.from_numpy(table) for name, table in rotary_inputs(shape, total + 1).items()}
    for name in (PAST_KEY, PAST_VALUE):
        dummies[name] = [_random(1, shape.num_kv_heads, total, shape.head_dim)]
    return dummies


def _random(*size: int) -> torch.Tensor:
    """Standard normal values, the same on every call with the same sizes."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))
