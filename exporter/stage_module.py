"""The parts of an EAGLE-3 head as torch modules, which are exported and compared with the graphs that come of it.

Graphs of the target's layers, and of EAGLE-1 heads, are written by ``layer_graph.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from exporter.config import LayerShape

Tensors = Mapping[str, torch.Tensor]


class FusedAttention(torch.autograd.Function):
    """Attention over a cache of fixed capacity: computed step by step in torch, one fused operator in ONNX.

    It is the fastest, but other rows in the cache may change a row's last bits: it is for drafters, whose bits decide
    nothing. Row ``r`` of the chunk takes slot ``total - rows + r``. It sees the slots up to its own (parents come
    before children), and the bias is added to its scores. The operator ignores position ids when there is no past, so
    callers keep ``rows < total``. The last ``padding[1]`` of the rows are zeros, added here and removed again from the
    result.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,  # [1, rows - padding, num_heads * head_dim]
        key: torch.Tensor,  # [1, rows - padding, num_kv_heads * head_dim]
        value: torch.Tensor,  # [1, rows - padding, num_kv_heads * head_dim]
        past_key: torch.Tensor,  # [1, num_kv_heads, capacity, head_dim]
        past_value: torch.Tensor,
        seqlens_k: torch.Tensor,  # int32 [1]
        total: torch.Tensor,  # int32 []
        cos: torch.Tensor,  # [at least total, head_dim / 2]
        sin: torch.Tensor,
        position_ids: torch.Tensor,  # [1, rows]
        attention_bias: torch.Tensor,  # [1, 1, rows, total]
        padding: torch.Tensor,  # int64 [2]
        num_heads: int,
        num_kv_heads: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        num_given = query.shape[1]
        query, key, value = (nn.functional.pad(rows, (0, 0, *padding.tolist())) for rows in (query, key, value))
        rows, stop = query.shape[1], int(total)
        head_dim = past_key.shape[-1]
        q = rotate(query.view(rows, num_heads, head_dim), cos, sin, position_ids[0])  # [rows, num_heads, head_dim]
        k = rotate(key.view(rows, num_kv_heads, head_dim), cos, sin, position_ids[0])
        present_key, present_value = past_key.clone(), past_value.clone()
        present_key[0, :, stop - rows : stop] = k.transpose(0, 1)
        present_value[0, :, stop - rows : stop] = value.view(rows, num_kv_heads, head_dim).transpose(0, 1)
        group = num_heads // num_kv_heads
        all_keys = present_key[0, :, :stop].repeat_interleave(group, dim=0)  # [num_heads, total, head_dim]
        all_values = present_value[0, :, :stop].repeat_interleave(group, dim=0)
        scores = q.transpose(0, 1) @ all_keys.transpose(1, 2) / head_dim**0.5 + attention_bias[0]
        later = torch.ones(rows, stop, dtype=torch.bool).triu(stop - rows + 1)
        weights = scores.masked_fill(later, float("-inf")).softmax(dim=-1)  # [num_heads, rows, total]
        attended = (weights @ all_values).transpose(0, 1).reshape(1, rows, num_heads * head_dim)
        return attended[:, :num_given], present_key, present_value

    @staticmethod
    def symbolic(
        g: Any,
        query: Any,
        key: Any,
        value: Any,
        past_key: Any,
        past_value: Any,
        seqlens_k: Any,
        total: Any,
        cos: Any,
        sin: Any,
        position_ids: Any,
        attention_bias: Any,
        padding: Any,
        num_heads: int,
        num_kv_heads: int,
    ) -> Any:
        rows_axis = g.op("Constant", value_t=torch.tensor([1]))
        zero = g.op("Constant", value_t=torch.tensor(0.0))
        padded = (g.op("Pad", rows, padding, zero, rows_axis) for rows in (query, key, value))
        cache = past_key, past_value, seqlens_k, total, cos, sin, position_ids, attention_bias
        attended, present_key, present_value = g.op(
            "com.microsoft::GroupQueryAttention",
            *padded,
            *cache,
            num_heads_i=num_heads,
            kv_num_heads_i=num_kv_heads,
            do_rotary_i=1,
            outputs=3,
        )
        first = g.op("Constant", value_t=torch.tensor([0]))
        num_given = g.op("Shape", query, start_i=1, end_i=2)
        attended = g.op("Slice", attended, first, num_given, rows_axis)
        attended.setType(query.type())
        present_key.setType(past_key.type())
        present_value.setType(past_value.type())
        return attended, present_key, present_value


def fused_attention(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FusedAttention as a function."""
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = FusedAttention.apply(*inputs)  # type: ignore[no-untyped-call]  # torch has no types for it
    return found


class TopLogProbs(torch.autograd.Function):
    """The ``k`` largest log-softmax values of each row, ``k`` being an input of the graph."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        top = logits.log_softmax(dim=-1).topk(int(k))
        return top.values, top.indices

    @staticmethod
    def symbolic(g: Any, logits: Any, k: Any) -> Any:
        log_probs = g.op("LogSoftmax", logits, axis_i=-1)
        return g.op("TopK", log_probs, k, axis_i=-1, largest_i=1, sorted_i=1, outputs=2)


class RmsNorm(nn.Module):
    """``x / rms(x) * weight``, written in the order that ONNX Runtime fuses into one operator."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    """Projections around the fused operator."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.num_heads, self.num_kv_heads = shape.num_heads, shape.num_kv_heads
        num_in = shape.hidden_size * shape.attention_inputs
        self.q_proj = nn.Linear(num_in, q_size, bias=shape.qkv_bias)
        self.k_proj = nn.Linear(num_in, kv_size, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(num_in, kv_size, bias=shape.qkv_bias)
        self.o_proj = nn.Linear(q_size, shape.hidden_size, bias=shape.output_bias)

    def forward(
        self, x: torch.Tensor, past_key: torch.Tensor, past_value: torch.Tensor, step: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        projected = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        heads = self.num_heads, self.num_kv_heads
        attended, key, value = fused_attention(*projected, past_key, past_value, *step, *heads)
        return self.o_proj(attended), key, value


class FeedForward(nn.Module):
    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=shape.mlp_bias)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=shape.mlp_bias)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=shape.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate_proj(x)
        out: torch.Tensor = self.down_proj(gate * torch.sigmoid(gate) * self.up_proj(x))
        return out


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in Llama's half-split layout; ``x`` is [rows, heads, head_dim]."""
    row_cos, row_sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)  # [rows, 1, head_dim / 2]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * row_cos - second * row_sin, second * row_cos + first * row_sin), dim=-1)


def with_weights(module: nn.Module, weights: Tensors) -> None:
    """Give ``module``, which was built on the meta device, exactly these tensors, and make it ready to run."""
    module.load_state_dict(dict(weights), strict=True, assign=True)
    module.eval().requires_grad_(False)
