"""The EAGLE-1 draft head: fc(concat(embedding, feature)), one decoder layer without input norm, the target's head, or
the rows of it that a vocabulary of the head's own names.

Source: Li et al., "EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty", section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from exporter.config import LayerShape, read_layer_shape
from exporter.eagle3 import D2T, DraftTop, Eagle3Head, is_eagle3, read_eagle3, read_target_tokens
from exporter.families import FAMILIES
from exporter.fields import positive_int
from exporter.matrices import parts_of
from exporter.source import Source
from exporter.stage_module import FusedBlock, with_weights
from exporter.target_digest import refuse_other_target
from exporter.tensors import TensorFiles, read_json
from flowspec_edge.errors import CheckpointError
from flowspec_edge.manifest import Geometry

EMBEDDING = "embed_tokens.weight"


@dataclass(frozen=True)
class DraftHead:
    """An EAGLE-1 head read from disk.

    ``target_tokens`` is the target's id of each draft token, [draft_vocab_size]; None where it drafts them all.
    """

    directory: Path
    shape: LayerShape
    weights: dict[str, torch.Tensor]
    target_tokens: torch.Tensor | None = None

    kind: ClassVar[str] = "eagle1"
    taps: ClassVar[tuple[int, ...]] = ()

    def build(self) -> EagleDrafter:
        with torch.device("meta"):
            drafter = EagleDrafter(self.shape, has_bias="fc.bias" in self.weights)
        with_weights(drafter, self.weights)
        return drafter

    def build_top(self, source: Source) -> DraftTop | None:
        """The target's output matrix for what is drafted, where that is not all."""
        if self.target_tokens is None:
            return None
        target, matrix, tokens = source.layer_shape, source.lm_head(), self.target_tokens.numpy()
        rows = np.empty((len(tokens), target.hidden_size), np.float32)
        for start, stop in parts_of(matrix):
            is_inside = (tokens >= start) & (tokens < stop)
            rows[is_inside] = matrix.unpacked(start, stop)[tokens[is_inside] - start]
        with torch.device("meta"):
            top = DraftTop(target, len(rows), has_norm=False, cap=target.logit_cap)
        weight = torch.from_numpy(rows) / target.logit_divisor
        with_weights(top, {"lm_head.weight": weight, "target_tokens": self.target_tokens})
        return top


class EagleDrafter(FusedBlock):
    """Maps the next token's embedding and the target's normed hidden row to a guess of the next normed hidden row."""

    def __init__(self, shape: LayerShape, *, has_bias: bool) -> None:
        super().__init__(shape, 0, 1, has_input_norm=False)
        self.fc = nn.Linear(2 * shape.hidden_size, shape.hidden_size, bias=has_bias)

    def forward(  # type: ignore[override]  # a drafter reads one input more than a block
        self,
        token_embedding: torch.Tensor,
        feature: torch.Tensor,
        attention_padding: torch.Tensor,
        attention_bias: torch.Tensor,
        position_ids: torch.Tensor,
        seqlens_k: torch.Tensor,
        total_sequence_length: torch.Tensor,
        rotary_cos: torch.Tensor,
        rotary_sin: torch.Tensor,
        past_key: Sequence[torch.Tensor],
        past_value: Sequence[torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        hidden = self.fc(torch.cat((token_embedding, feature), dim=-1))  # [1, rows, hidden_size]
        return super().forward(
            hidden,
            attention_padding,
            attention_bias,
            position_ids,
            seqlens_k,
            total_sequence_length,
            rotary_cos,
            rotary_sin,
            past_key,
            past_value,
        )


def load_draft_head(directory: Path, source: Source, *, allow_pickle: bool = False) -> DraftHead | Eagle3Head:
    """Read an EAGLE-1 or EAGLE-3 head in its published layout. The head's own copy of the embedding is not read.

    Raises:
        CheckpointError: neither of them, or made for another target than ``source``.
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
    if is_eagle3(tensors):
        return read_eagle3(path, config, tensors, replace(shape, attention_inputs=2), target)
    return _read_eagle1(path, config, tensors, shape, target)


def _read_eagle1(
    path: Path, config: dict[str, Any], tensors: TensorFiles, shape: LayerShape, target: Geometry
) -> DraftHead:
    hidden = shape.hidden_size
    sizes = {"fc.weight": (hidden, 2 * hidden), "fc.bias": (hidden,), EMBEDDING: (target.vocab_size, hidden)}
    sizes |= {f"layers.0.{name}": size for name, size in shape.tensor_shapes().items()}
    del sizes["layers.0.input_layernorm.weight"]
    for name in tensors.names():
        if name not in sizes and name != D2T:
            raise CheckpointError(
                f"{tensors.directory}: has {name}, so it is neither an EAGLE-1 head (one layer, no input norm) "
                "nor an EAGLE-3 head (with a hidden_norm)"
            )
    for name in ("fc.bias", EMBEDDING):  # some heads lack them
        if name not in tensors:
            del sizes[name]
    weights = {name: tensors.read(name, size) for name, size in sizes.items()}
    weights.pop(EMBEDDING, None)
    floats = {name: weight.float() for name, weight in weights.items()}
    num_tokens = positive_int(path, config, "draft_vocab_size", target.vocab_size)
    drafts_all = num_tokens == target.vocab_size and D2T not in tensors
    tokens = None if drafts_all else read_target_tokens(tensors, num_tokens, target)
    return DraftHead(tensors.directory, shape, floats, tokens)


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
