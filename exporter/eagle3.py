"""The EAGLE-3 draft head in its published layouts: an ``fc`` that fuses rows of some of the target's layers, one
decoder layer, a norm, and an output matrix over a vocabulary of its own.

The layer is named ``midlayer``, or ``layers.0`` in newer heads, which may have norms that the first ones have not.

Source: Li et al., "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time Test", section
3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PretrainedConfig

from exporter.config import LayerShape
from exporter.drafted_tokens import D2T, read_target_tokens
from exporter.fields import positive_int
from exporter.stage_module import (
    Attention,
    FeedForward,
    RmsNorm,
    TopLogProbs,
    with_weights,
)
from exporter.tensors import TensorFiles
from flowspec_edge.errors import CheckpointError
from flowspec_edge.manifest import HIDDEN_OUT, PRESENT_KEY, PRESENT_VALUE, TOP_LOG_PROBS, TOP_TOKENS, Geometry

EMBEDDING = "embed_tokens.weight"
LAYER_NAMES = ("midlayer.", "layers.0.")


@dataclass(frozen=True)
class Eagle3Head:
    """An EAGLE-3 head read from disk.

    ``target_tokens`` is the target's id of each draft token, [draft_vocab_size]. Where it ``adds_normed``, its layer
    adds to the normed feature what it makes of that; where it ``returns_normed``, features are normed as they leave it.
    """

    shape: LayerShape
    weights: dict[str, torch.Tensor]
    target_tokens: torch.Tensor
    taps: tuple[int, ...]
    adds_normed: bool = False
    returns_normed: bool = False

    kind: ClassVar[str] = "eagle3"

    def build(self) -> Eagle3Layer:
        with torch.device("meta"):
            drafter = Eagle3Layer(self.shape, adds_normed=self.adds_normed, returns_normed=self.returns_normed)
        with_weights(drafter, self._part("midlayer.", *["norm."] * self.returns_normed))
        return drafter

    def build_fuse(self) -> Fuse:
        with torch.device("meta"):
            fuse = Fuse(
                self.shape,
                len(self.taps),
                norms_all="input_norm.weight" in self.weights,
                norms_each="fc_norm.0.weight" in self.weights,
            )
        with_weights(fuse, self._part("fc.", "input_norm.", "fc_norm."))
        return fuse

    def build_top(self) -> DraftTop:
        with torch.device("meta"):
            top = DraftTop(self.shape, len(self.target_tokens), has_norm=not self.returns_normed)
        own = self._part("lm_head.", *["norm."] * (not self.returns_normed))
        with_weights(top, {**own, "target_tokens": self.target_tokens})
        return top

    def _part(self, *prefixes: str) -> dict[str, torch.Tensor]:
        return {name: weight for name, weight in self.weights.items() if name.startswith(prefixes)}


class MidLayer(nn.Module):
    """A decoder layer whose attention reads the normed embedding beside the normed feature."""

    def __init__(self, shape: LayerShape, *, adds_normed: bool) -> None:
        super().__init__()
        self.adds_normed = adds_normed
        self.hidden_norm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self.input_layernorm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = FeedForward(shape)

    def forward(
        self,
        embedding: torch.Tensor,
        feature: torch.Tensor,
        past_key: torch.Tensor,
        past_value: torch.Tensor,
        step: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        normed = self.hidden_norm(feature)
        x = torch.cat((self.input_layernorm(embedding), normed), dim=-1)  # [1, rows, 2 * hidden_size]
        attended, key, value = self.self_attn(x, past_key, past_value, step)
        x = (normed if self.adds_normed else feature) + attended
        return x + self.mlp(self.post_attention_layernorm(x)), key, value


class Eagle3Layer(nn.Module):
    """Maps the next token's embedding and a row's feature to the feature of the row after it."""

    def __init__(self, shape: LayerShape, *, adds_normed: bool, returns_normed: bool) -> None:
        super().__init__()
        self.config = PretrainedConfig()  # optimum's export reads and sets fields of it
        self.shape = shape
        self.midlayer = MidLayer(shape, adds_normed=adds_normed)
        self.norm = RmsNorm(shape.hidden_size, shape.rms_norm_eps) if returns_normed else nn.Identity()

    def forward(
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
        step = (
            seqlens_k,
            total_sequence_length,
            rotary_cos,
            rotary_sin,
            position_ids,
            attention_bias,
            attention_padding,
        )
        hidden, key, value = self.midlayer(token_embedding, feature, past_key[0], past_value[0], step)
        return {HIDDEN_OUT: self.norm(hidden), f"{PRESENT_KEY}.0": key, f"{PRESENT_VALUE}.0": value}


class Fuse(nn.Module):
    """Fuses the tapped rows of a token, given side by side: [1, rows, taps * hidden_size] to [1, rows, hidden_size].

    Some heads norm them before: all together, or each by itself.
    """

    def __init__(self, shape: LayerShape, num_taps: int, *, norms_all: bool, norms_each: bool) -> None:
        super().__init__()
        self.config = PretrainedConfig()
        size, eps = shape.hidden_size, shape.rms_norm_eps
        self.num_taps = num_taps
        self.fc = nn.Linear(num_taps * size, size, bias=False)
        self.input_norm = RmsNorm(num_taps * size, eps) if norms_all else nn.Identity()
        self.fc_norm = nn.ModuleList(RmsNorm(size, eps) for _ in range(num_taps if norms_each else 0))

    def forward(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.input_norm(hidden)
        if self.fc_norm:
            taps = zip(self.fc_norm, hidden.chunk(self.num_taps, dim=-1), strict=True)
            hidden = torch.cat([norm(rows) for norm, rows in taps], dim=-1)
        return {HIDDEN_OUT: self.fc(hidden)}


class DraftTop(nn.Module):
    """Maps features to the ``k`` likeliest draft tokens, as ids of the target's vocabulary, and their
    log-probabilities.
    """

    target_tokens: torch.Tensor

    def __init__(self, shape: LayerShape, num_tokens: int, *, has_norm: bool) -> None:
        super().__init__()
        self.config = PretrainedConfig()
        self.norm = RmsNorm(shape.hidden_size, shape.rms_norm_eps) if has_norm else nn.Identity()
        self.lm_head = nn.Linear(shape.hidden_size, num_tokens, bias=False)
        self.register_buffer("target_tokens", torch.empty(num_tokens, dtype=torch.int64))

    def forward(self, hidden: torch.Tensor, k: torch.Tensor) -> dict[str, torch.Tensor]:
        log_probs, draft_tokens = TopLogProbs.apply(self.lm_head(self.norm(hidden)), k)  # type: ignore[no-untyped-call]  # torch has no types for it
        return {TOP_LOG_PROBS: log_probs, TOP_TOKENS: self.target_tokens[draft_tokens]}


def read_eagle3(
    path: Path, config: dict[str, Any], tensors: TensorFiles, shape: LayerShape, target: Geometry
) -> Eagle3Head:
    """Read the tensors of an EAGLE-3 head. The head's own copy of the embedding is not read.

    Raises:
        CheckpointError: a tensor is missing or of another shape, or the head is for another kind of target.
    """
    num_tokens = positive_int(path, config, "draft_vocab_size", target.vocab_size)
    taps = _choose_taps(path, config, target)
    layer = next(layer for layer in LAYER_NAMES if f"{layer}hidden_norm.weight" in tensors)
    sizes = _sizes(config, shape, layer, num_tokens, len(taps))
    known = {EMBEDDING, D2T, "t2d", *sizes}
    for name in tensors.names():
        if name not in known:
            raise CheckpointError(f"{tensors.directory}: tensor {name} has no place in an EAGLE-3 head of one layer")
    weights = {
        name.replace(layer, LAYER_NAMES[0]): torch.from_numpy(tensors.read(name, size)) for name, size in sizes.items()
    }
    return Eagle3Head(
        shape,
        weights,
        torch.from_numpy(read_target_tokens(tensors, num_tokens, target)),
        taps,
        adds_normed=bool(_feature(config, "norm_before_residual")),
        returns_normed=bool(_feature(config, "norm_output")),
    )


def _sizes(
    config: dict[str, Any], shape: LayerShape, layer: str, num_tokens: int, num_taps: int
) -> dict[str, tuple[int, ...]]:
    """The tensors of a head whose config names its norms."""
    hidden = shape.hidden_size
    sizes = {f"{layer}{name}": size for name, size in shape.tensor_shapes().items()}
    sizes |= {f"{layer}hidden_norm.weight": (hidden,), "fc.weight": (hidden, num_taps * hidden)}
    sizes |= {"norm.weight": (hidden,), "lm_head.weight": (num_tokens, hidden)}
    if _feature(config, "norm_before_fc"):
        sizes["input_norm.weight"] = (num_taps * hidden,)
    if _feature(config, "fc_norm"):
        sizes |= {f"fc_norm.{tap}.weight": (hidden,) for tap in range(num_taps)}
    return sizes


def _feature(config: dict[str, Any], name: str) -> Any:
    """A field of the config, which some have in ``eagle_config``."""
    return config.get(name, (config.get("eagle_config") or {}).get(name))


def _choose_taps(path: Path, config: dict[str, Any], target: Geometry) -> tuple[int, ...]:
    """The layers whose inputs are fused: those that the config names, or the published default.

    Heads of vLLM's tools name them; ``eagle_config``, of NVIDIA's, names the layers before them.
    """
    named = config.get("eagle_aux_hidden_state_layer_ids")
    before = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    taps = [2, target.num_layers // 2, target.num_layers - 3]
    if named:
        taps = list(named)
    elif before:
        taps = [layer + 1 for layer in before]
    if sorted(set(taps)) != taps or taps[0] < 1 or taps[-1] >= target.num_layers:
        raise CheckpointError(
            f"{path}: an EAGLE-3 head fuses the rows that enter some layers, here {taps}, which a target of "
            f"{target.num_layers} layers does not have"
        )
    return tuple(taps)
