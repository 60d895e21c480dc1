"""The EAGLE-1 draft head: fc(concat(embedding, feature)), one decoder layer without input norm, the target's head.

Source: Li et al., "EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty", section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from exporter.model import LayerShape, TensorFiles, read_json, read_layer_shape
from exporter.stage_module import LayerBlock, with_weights
from flowspec_edge.errors import CheckpointError
from flowspec_edge.manifest import Geometry

KIND = "eagle1"


@dataclass(frozen=True)
class DraftHead:
    """An EAGLE-1 head read from disk."""

    directory: Path
    shape: LayerShape
    weights: dict[str, torch.Tensor]

    def build(self) -> EagleDrafter:
        with torch.device("meta"):
            drafter = EagleDrafter(self.shape, has_bias="fc.bias" in self.weights)
        with_weights(drafter, self.weights)
        return drafter


class EagleDrafter(LayerBlock):
    """Maps the next token's embedding and the target's normed hidden row to a guess of the next normed hidden row."""

    def __init__(self, shape: LayerShape, *, has_bias: bool) -> None:
        super().__init__(shape, 0, 1, has_input_norm=False)
        self.fc = nn.Linear(2 * shape.hidden_size, shape.hidden_size, bias=has_bias)

    def forward(  # type: ignore[override]
        self,
        token_embedding: torch.Tensor,
        feature: torch.Tensor,
        attention_bias: torch.Tensor,
        position_ids: torch.Tensor,
        seqlens_k: torch.Tensor,
        total_sequence_length: torch.Tensor,
        past_key: Sequence[torch.Tensor],
        past_value: Sequence[torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        hidden = self.fc(torch.cat((token_embedding, feature), dim=-1))  # [1, rows, hidden_size]
        return super().forward(
            hidden, attention_bias, position_ids, seqlens_k, total_sequence_length, past_key, past_value
        )


def load_draft_head(directory: Path, target: Geometry) -> DraftHead:
    """Read an EAGLE-1 head in its published layout. Its own copy of the embedding, if any, is left aside.

    Raises:
        CheckpointError: not an EAGLE-1 head, or made for a target of another hidden size.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such drafter directory")
    path = directory / "config.json"
    config = read_json(path)
    tensors = TensorFiles(directory)
    if "d2t" in tensors or any(name.startswith("midlayer.") for name in tensors.names()):
        raise CheckpointError(f"{directory}: this is an EAGLE-3 head, which is not supported yet; supported: EAGLE-1")
    own = read_layer_shape(path, config)
    if own.hidden_size != target.hidden_size:
        raise CheckpointError(
            f"{path}: the drafter's hidden_size is {own.hidden_size}, the target's is {target.hidden_size}; "
            "use the head trained for this target"
        )
    if own.max_context < target.max_context:
        raise CheckpointError(
            f"{path}: the drafter's max_position_embeddings is {own.max_context}, the target's context is "
            f"{target.max_context}; pass --max-context {own.max_context}"
        )
    for name in ("layers.0.input_layernorm.weight", "layers.1.self_attn.q_proj.weight"):
        if name in tensors:
            raise CheckpointError(f"{directory}: has {name}, so it is not an EAGLE-1 head (one layer, no input norm)")
    shape = read_layer_shape(path, config, target.max_context)
    hidden = shape.hidden_size
    weights = {"fc.weight": tensors.read("fc.weight", (hidden, 2 * hidden)).float()}
    if "fc.bias" in tensors:
        weights["fc.bias"] = tensors.read("fc.bias", (hidden,)).float()
    for name, size in shape.tensor_shapes().items():
        if name != "input_layernorm.weight":
            weights[f"layers.0.{name}"] = tensors.read(f"layers.0.{name}", size).float()
    return DraftHead(directory, shape, weights)
