"""Runs torch modules on the steps that graphs are compared on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from exporter.layer_graph import Weights
from exporter.stage_module import Block, FusedBlock
from exporter.steps import Step, rotary_inputs, step_inputs
from flowspec_edge.manifest import HIDDEN_OUT, PRESENT_KEY, PRESENT_VALUE


def as_tensors(weights: Weights) -> dict[str, torch.Tensor]:
    """The weights of layers in float32."""
    return {
        name: torch.from_numpy(weight if isinstance(weight, np.ndarray) else weight.unpacked())
        for name, weight in weights.items()
    }


class TorchLayers:
    """The torch module of a block or drafter, run step by step with caches of its own."""

    def __init__(self, module: Block, num_slots: int) -> None:
        self.module = module
        self._num_slots = num_slots
        shape, self._is_fused = module.shape, isinstance(module, FusedBlock)
        outer = (1, shape.num_kv_heads) if self._is_fused else (shape.num_kv_heads, 1)
        self._layers = range(module.start, module.stop)
        self._keys = [torch.zeros(*outer, num_slots, shape.head_dim) for _ in self._layers]
        width = shape.head_dim + (not self._is_fused)
        self._values = [torch.zeros(*outer, num_slots, width) for _ in self._layers]
        self._rotary = rotary_inputs(shape, num_slots)

    def run(self, rows: Mapping[str, np.ndarray], step: Step) -> np.ndarray:
        inputs = step_inputs(step, rows, self.module.shape, self._num_slots, is_fused=self._is_fused)
        arrays = {**rows, **self._rotary, **inputs}
        given = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
        with torch.no_grad():
            outputs = self.module(**given, past_key=self._keys, past_value=self._values)
        self._keys = [outputs[f"{PRESENT_KEY}.{i}"] for i in self._layers]
        self._values = [outputs[f"{PRESENT_VALUE}.{i}"] for i in self._layers]
        hidden: np.ndarray = outputs[HIDDEN_OUT].numpy()
        return hidden
