"""Runs torch modules on the steps that graphs are compared on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from exporter.layer_graph import Weights
from exporter.stage_module import FusedBlock
from exporter.steps import Step, rotary_inputs
from flowspec_edge.manifest import FEATURE, HIDDEN_OUT, PRESENT_KEY, PRESENT_VALUE


def as_tensors(weights: Weights) -> dict[str, torch.Tensor]:
    """The weights of layers in float32."""
    return {
        name: torch.from_numpy(weight if isinstance(weight, np.ndarray) else weight.unpacked())
        for name, weight in weights.items()
    }


class TorchLayers:
    """The torch module of a drafter, run step by step with caches of its own."""

    def __init__(self, module: FusedBlock, num_slots: int) -> None:
        self.module = module
        shape, self._layers = module.shape, range(module.start, module.stop)
        size = 1, shape.num_kv_heads, num_slots, shape.head_dim
        self._keys, self._values = ([torch.zeros(size) for _ in self._layers] for _ in range(2))
        self._rotary = rotary_inputs(shape, num_slots)

    def run(self, rows: Mapping[str, np.ndarray], step: Step) -> np.ndarray:
        arrays = {**rows, **self._rotary, **step.fused_inputs(shift=int(FEATURE in rows))}
        given = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
        with torch.no_grad():
            outputs = self.module(**given, past_key=self._keys, past_value=self._values)
        self._keys = [outputs[f"{PRESENT_KEY}.{i}"] for i in self._layers]
        self._values = [outputs[f"{PRESENT_VALUE}.{i}"] for i in self._layers]
        hidden: np.ndarray = outputs[HIDDEN_OUT].numpy()
        return hidden
