"""Runs torch modules on the steps that graphs are compared on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from exporter.eagle3 import Eagle3Layer
from exporter.steps import Step, rotary_inputs
from flowspec_edge.manifest import HIDDEN_OUT, PRESENT_KEY, PRESENT_VALUE


class TorchDrafter:
    """The torch module of a drafter, run step by step with a cache of its own."""

    def __init__(self, module: Eagle3Layer, num_slots: int) -> None:
        self._module = module
        shape = module.shape
        size = 1, shape.num_kv_heads, num_slots, shape.head_dim
        self._keys, self._values = torch.zeros(size), torch.zeros(size)
        self._rotary = rotary_inputs(shape, num_slots)

    def run(self, rows: Mapping[str, np.ndarray], step: Step) -> np.ndarray:
        arrays = {**rows, **self._rotary, **step.fused_inputs(shift=1)}
        given = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
        with torch.no_grad():
            outputs = self._module(**given, past_key=[self._keys], past_value=[self._values])
        self._keys, self._values = outputs[f"{PRESENT_KEY}.0"], outputs[f"{PRESENT_VALUE}.0"]
        hidden: np.ndarray = outputs[HIDDEN_OUT].numpy()
        return hidden
