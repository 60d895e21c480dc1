"""Draft heads in their published layouts: finds out of which kind one is, and whether it was made for a target."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from exporter.assembly import Draft
from exporter.config import LayerShape, read_layer_shape
from exporter.eagle1 import Eagle1Draft, read_eagle1
from exporter.families import FAMILIES
from exporter.fields import positive_int, read_json
from exporter.source import Source
from exporter.target_digest import refuse_other_target
from exporter.tensors import TensorFiles
from flowspec_edge.errors import CheckpointError
from flowspec_edge.manifest import Geometry

HIDDEN_NORMS = "midlayer.hidden_norm.weight", "layers.0.hidden_norm.weight"
"""Of EAGLE-3 heads, which have one of them."""


def open_draft(directory: Path, source: Source, *, allow_pickle: bool = False) -> Draft:
    """Read an EAGLE-1 or EAGLE-3 head in its published layout. The head's own copy of the embedding is not read.

    EAGLE-3 heads need torch and optimum, and so do heads that are pickled or of bfloat16.

    Raises:
        CheckpointError: neither of them, or made for another target than ``source``.
        ImportError: a library that it needs is not installed.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such drafter directory")
    path, target = directory / "config.json", source.geometry
    config = read_json(path)
    if isinstance(layer := config.get("transformer_layer_config"), dict):  # as vLLM's tools have it
        config = {**layer, **config}
    tensors = TensorFiles(directory, allow_pickle=allow_pickle)
    family = replace(FAMILIES["LlamaForCausalLM"], qkv_bias=bool(config.get("qkv_bias", False)))
    shape = read_layer_shape(path, {"num_hidden_layers": 1, **config}, family)
    if shape.rope_scale != 1.0 or shape.num_rotated != shape.head_dim:
        raise CheckpointError(
            f"{path}: a rope that scales attention, or rotates a part of each head, is not supported in draft heads"
        )
    _refuse_other_sizes(path, config, shape, target)
    refuse_other_target(path, config, source)
    if not any(name in tensors for name in HIDDEN_NORMS):
        return Eagle1Draft(read_eagle1(path, config, tensors, shape, target), source)
    from exporter.draft_export import DraftExport
    from exporter.eagle3 import read_eagle3

    return DraftExport(read_eagle3(path, config, tensors, replace(shape, attention_inputs=2), target))


def _refuse_other_sizes(path: Path, config: dict[str, Any], shape: LayerShape, target: Geometry) -> None:
    if shape.hidden_size != target.hidden_size:
        raise CheckpointError(
            f"{path}: the drafter's hidden_size is {shape.hidden_size}, the target's is {target.hidden_size}; "
            "use the head trained for this target"
        )
    vocab_size = positive_int(path, config, "vocab_size")
    if vocab_size != target.vocab_size:
        raise CheckpointError(
            f"{path}: the drafter's vocab_size is {vocab_size}, the target's is {target.vocab_size}; "
            "use the head trained for this target"
        )
