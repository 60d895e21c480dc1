"""Targets of every supported family, and EAGLE-1 heads, as torch modules that run over whole batches.

They compute what ``layer_graph.py`` and ``stage_module.py`` write, and their tensors have the published names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from exporter.config import LayerShape

Rotations = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Cosines and sines of the rows, [..., rows, head_dim / 2], of layers that see all rows, and of those with a window."""
Attend = Callable[["Attention", torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""What rows attend to, from scaled queries [batch, heads, rows, head_dim], keys and values [batch, kv_heads, ...]."""


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Rope(nn.Module):
    frequencies: torch.Tensor

    def __init__(self, frequencies: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.from_numpy(np.array(frequencies, np.float32)), persistent=False)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions[..., None] * self.frequencies
        return angles.cos(), angles.sin()


class Attention(nn.Module):
    query_scales: torch.Tensor

    def __init__(self, shape: LayerShape, layer: int) -> None:
        super().__init__()
        q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, q_size, bias=shape.qkv_bias)
        self.k_proj = nn.Linear(shape.hidden_size, kv_size, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(shape.hidden_size, kv_size, bias=shape.qkv_bias)
        self.o_proj = nn.Linear(q_size, shape.hidden_size, bias=shape.output_bias)
        self.qk_norm, self.head_dim, self.score_cap = shape.qk_norm, shape.head_dim, shape.score_cap
        if shape.qk_norm != "none":
            by_head = shape.qk_norm == "head"
            self.q_norm = Norm(shape.head_dim if by_head else q_size, shape.rms_norm_eps)
            self.k_norm = Norm(shape.head_dim if by_head else kv_size, shape.rms_norm_eps)
        is_sliding = layer in shape.sliding_layers
        self.window = shape.window if is_sliding else None
        self.rope_kind = None if layer in shape.unrotated_layers else int(is_sliding)
        self.register_buffer("query_scales", torch.from_numpy(shape.query_scales(layer)), persistent=False)

    def project(self, x: torch.Tensor, rotations: Rotations) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, rotated and scaled, rotated keys, and values: each [batch, its heads, rows, head_dim]."""
        query, key = self.q_proj(x), self.k_proj(x)
        if self.qk_norm == "projection":
            query, key = self.q_norm(query), self.k_norm(key)
        q, k, v = (self._by_head(rows) for rows in (query, key, self.v_proj(x)))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope_kind is not None:
            q, k = rotate(q, *rotations[self.rope_kind]), rotate(k, *rotations[self.rope_kind])
        return q * self.query_scales, k, v

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attention of rows to those that they have ``seen``, [..., rows, rows of keys]; None: to those before them."""
        batch, heads, rows, head_dim = q.shape
        num_keys = k.shape[2]
        if seen is None and (self.score_cap is not None or (self.window is not None and num_keys > self.window)):
            seen = torch.ones(rows, num_keys, dtype=torch.bool, device=q.device).tril(num_keys - rows)
        if seen is None:
            k, v = (share(x, heads // k.shape[1]) for x in (k, v))
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
        if self.window is not None:
            seen = seen & (seen.flip(-1).cumsum(-1).flip(-1) <= self.window)
        group = heads // k.shape[1]  # the queries that share a key are rows of its own attention
        seen = seen.repeat(*[1] * (seen.dim() - 2), group, 1)
        q = q.reshape(batch, -1, group * rows, head_dim)
        out: torch.Tensor
        if self.score_cap is None:
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=1.0)
        else:
            scores = self.score_cap * torch.tanh(q @ k.transpose(2, 3) / self.score_cap)
            out = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1) @ v
        return out.reshape(batch, heads, rows, head_dim)

    def merge(self, attended: torch.Tensor) -> torch.Tensor:
        batch, _, rows, _ = attended.shape
        out: torch.Tensor = self.o_proj(attended.transpose(1, 2).reshape(batch, rows, -1))
        return out

    def _by_head(self, rows: torch.Tensor) -> torch.Tensor:
        by_head: torch.Tensor = rows.unflatten(-1, (-1, self.head_dim))
        return by_head.transpose(1, 2)


class FeedForward(nn.Module):
    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=shape.mlp_bias)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=shape.mlp_bias)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=shape.mlp_bias)
        self.activation = shape.activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate_proj(x)
        gate = functional.silu(gate) if self.activation == "silu" else functional.gelu(gate, approximate="tanh")
        out: torch.Tensor = self.down_proj(gate * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One decoder layer. That of an EAGLE head has no input norm."""

    def __init__(self, shape: LayerShape, number: int = 0, *, has_input_norm: bool = True) -> None:
        super().__init__()
        self.norms, self.residual_scale = shape.norms, shape.residual_scale
        for name in shape.norms.names:
            is_there = has_input_norm or name != shape.norms.before_attention
            self.add_module(name, Norm(shape.hidden_size, shape.rms_norm_eps) if is_there else nn.Identity())
        self.self_attn = Attention(shape, number)
        self.mlp = FeedForward(shape)

    def forward(self, x: torch.Tensor, rotations: Rotations, attend: Attend = Attention.attend) -> torch.Tensor:
        q, k, v = self.self_attn.project(self._norm(self.norms.before_attention, x), rotations)
        attended = self.self_attn.merge(attend(self.self_attn, q, k, v))
        x = x + self._norm(self.norms.after_attention, attended) * self.residual_scale
        inner = self.mlp(self._norm(self.norms.before_mlp, x))
        return x + self._norm(self.norms.after_mlp, inner) * self.residual_scale

    def _norm(self, name: str | None, x: torch.Tensor) -> torch.Tensor:
        return x if name is None else cast(torch.Tensor, self.get_submodule(name)(x))


class LayerStack(nn.Module):
    """Layers with the rotary embeddings that they need."""

    def __init__(self, shape: LayerShape, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.shape = shape
        self.layers = nn.ModuleList(layers)
        self.ropes = nn.ModuleList(Rope(frequencies) for frequencies in shape.ropes)

    @property
    def stack(self) -> list[Layer]:
        return cast(list[Layer], list(self.layers))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def rotations(self, positions: torch.Tensor) -> Rotations:
        """For the rows at ``positions``, [rows] or [batch, 1, rows]."""
        return [rope(positions) for rope in self.ropes]


class Target(LayerStack):
    """A model of a supported family. Its tensors have the names of a checkpoint without the prefix ``model.``."""

    def __init__(self, shape: LayerShape, num_layers: int, vocab_size: int, *, is_tied: bool = True) -> None:
        super().__init__(shape, [Layer(shape, number) for number in range(num_layers)])
        self.embed_tokens = nn.Embedding(vocab_size, shape.hidden_size)
        self.norm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.lm_head = None if is_tied else nn.Linear(shape.hidden_size, vocab_size, bias=False)

    @property
    def output_matrix(self) -> torch.Tensor:
        """[vocab_size, hidden_size]"""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """The rows that enter the first layer."""
        rows: torch.Tensor = self.embed_tokens(tokens)
        return rows if self.shape.embedding_scale == 1.0 else rows * self.shape.embedding_scale

    def features(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows after the final norm, [batch, rows, hidden_size], from which the head drafts."""
        rotations = self.rotations(torch.arange(tokens.shape[1], device=tokens.device))
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, rotations)
        normed: torch.Tensor = self.norm(x)
        return normed

    def logits(self, features: torch.Tensor, matrix: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of all tokens, or of those whose rows of the output matrix are given."""
        logits = functional.linear(features, self.output_matrix if matrix is None else matrix)
        if self.shape.logit_divisor != 1.0:
            logits = logits / self.shape.logit_divisor
        cap = self.shape.logit_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats of ``labels`` [batch, rows], each of which is the token after the one in
        ``tokens``.
        """
        logits = self.logits(self.features(tokens))
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class DraftHead(LayerStack):
    """An EAGLE-1 head: ``fc`` over embedding and feature, and one layer without input norm.

    It drafts the ``tokens``, [drafted] in ascending order, or all that the target has.
    """

    def __init__(self, shape: LayerShape, tokens: torch.Tensor | None = None) -> None:
        super().__init__(shape, [Layer(shape, has_input_norm=False)])
        self.fc = nn.Linear(2 * shape.hidden_size, shape.hidden_size)
        self.tokens = tokens


class Drafting:
    """A head, and what it shares with its target: the embedding, and the output matrix of the tokens that it drafts."""

    def __init__(self, target: Target, head: DraftHead) -> None:
        self.target, self.head = target, head
        tokens = torch.arange(len(target.output_matrix)) if head.tokens is None else head.tokens
        self.tokens = tokens.to(target.device)
        self.matrix = target.output_matrix.detach()
        if head.tokens is not None:
            self.matrix = self.matrix[self.tokens]
        self.is_drafted = torch.zeros(len(target.output_matrix), dtype=torch.bool, device=target.device)
        self.is_drafted[self.tokens] = True

    def fuse(self, tokens: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """What enters the head's layer, from features and the tokens after them."""
        embedded = self.target.embed_tokens(tokens).detach()
        fused: torch.Tensor = self.head.fc(torch.cat((embedded, features), dim=-1))
        return fused

    def log_probs(self, rows: torch.Tensor) -> torch.Tensor:
        """Of the tokens that are drafted: [..., drafted]."""
        return self.target.logits(rows, self.matrix).log_softmax(dim=-1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in Llama's half-split layout; ``x`` is [batch, heads, rows, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def share(x: torch.Tensor, group: int) -> torch.Tensor:
    """``x`` with each key-value head repeated for the ``group`` query heads that read it."""
    batch, heads, rows, head_dim = x.shape
    return x[:, :, None].expand(batch, heads, group, rows, head_dim).reshape(batch, heads * group, rows, head_dim)


def initialize(module: nn.Module, seed: int) -> None:
    """Fill ``module`` with random weights: normal, and narrower where a layer writes to the residual stream."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
            else:
                is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
                parameter.normal_(0.0, 0.005 if is_output else 0.02, generator=generator)
