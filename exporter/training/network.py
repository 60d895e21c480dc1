"""The demo target and its EAGLE-1 head as torch modules that can be trained, under their published tensor names.

The same mathematics as ``exporter.stage_module``, over whole batches and without caches.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from flowspec_edge.errors import TrainingError

PAD_TOKEN = 1


@dataclass(frozen=True)
class Shape:
    """Geometry of the demo target. The head has one layer of this geometry."""

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 704
    num_layers: int = 8
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    max_context: int = 1024
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0


class Norm(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.hidden_size))
        self.eps = shape.rms_norm_eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, shape.hidden_size, bias=False)

    def project(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Rotated queries, rotated keys and values of ``x``: each [batch, heads, rows, head_dim]."""
        batch, rows, _ = x.shape
        q, k, v = (
            projection(x).view(batch, rows, -1, self.shape.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        group = self.shape.num_heads // self.shape.num_kv_heads
        return rotate(q, cos, sin), share(rotate(k, cos, sin), group), share(v, group)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x, cos, sin)
        return self.merge(functional.scaled_dot_product_attention(q, k, v, is_causal=True))

    def merge(self, attended: torch.Tensor) -> torch.Tensor:
        batch, _, rows, _ = attended.shape
        out: torch.Tensor = self.o_proj(attended.transpose(1, 2).reshape(batch, rows, -1))
        return out


class FeedForward(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One Llama layer. The layer of an EAGLE head has no input norm."""

    def __init__(self, shape: Shape, *, has_input_norm: bool = True) -> None:
        super().__init__()
        if has_input_norm:
            self.input_layernorm = Norm(shape)
        self.has_input_norm = has_input_norm
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape)
        self.mlp = FeedForward(shape)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x) if self.has_input_norm else x, cos, sin)
        out: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Target(nn.Module):
    """A Llama with tied embeddings. Its tensors are named as in ``LlamaForCausalLM``, without the prefix ``model.``."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = Norm(shape)
        self.cos, self.sin = rotary(shape)

    def features(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows after the final norm, [batch, rows, hidden_size], from which the head drafts."""
        rows = tokens.shape[1]
        cos, sin = self.cos[:rows], self.sin[:rows]
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        normed: torch.Tensor = self.norm(x)
        return normed

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        return functional.linear(features, self.embed_tokens.weight)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats of ``labels`` [batch, rows], each of which is the token after the one in
        ``tokens``.
        """
        logits = self.logits(self.features(tokens))
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class DraftHead(nn.Module):
    """An EAGLE-1 head: ``fc`` over embedding and feature, and one layer without input norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.fc = nn.Linear(2 * shape.hidden_size, shape.hidden_size)
        self.layers = nn.ModuleList([Layer(shape, has_input_norm=False)])
        self.cos, self.sin = rotary(shape)


def rotary(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines by position, [max_context, head_dim / 2] each."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angles = torch.outer(torch.arange(shape.max_context, dtype=torch.float32), 1.0 / shape.rope_theta**exponents)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in Llama's half-split layout; ``x`` is [batch, heads, rows, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def share(x: torch.Tensor, group: int) -> torch.Tensor:
    """``x`` with each key-value head repeated for the ``group`` query heads that read it."""
    batch, heads, rows, head_dim = x.shape
    return x[:, :, None].expand(batch, heads, group, rows, head_dim).reshape(batch, heads * group, rows, head_dim)


def save_target(target: Target, directory: Path, tokenizer: Path) -> None:
    """Write a ``LlamaForCausalLM`` directory: float16 safetensors, config, tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    config = configuration(target.shape, architectures=["LlamaForCausalLM"])
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (tokenizer.parent / name).exists():
            shutil.copyfile(tokenizer.parent / name, directory / name)
    save_file(halved(target, "model."), directory / "model.safetensors", metadata={"format": "pt"})


def save_head(head: DraftHead, directory: Path) -> None:
    """Write an EAGLE-1 directory in the published layout: float16 safetensors and config."""
    directory.mkdir(parents=True, exist_ok=True)
    config = configuration(
        head.shape,
        architectures=["EagleLlamaForCausalLM"],
        num_hidden_layers=1,
        bias=True,
        eagle={
            "version": 1,
            "fc_input": "concat(embed(token_{i+1}), hidden_i post-final-norm)",
            "rope_position": "i",
            "layer0_input_layernorm": False,
            "final_norm": False,
            "embed": "target embed_tokens",
            "lm_head": "target lm_head (tied)",
        },
    )
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    save_file(halved(head), directory / "model.safetensors", metadata={"format": "pt"})


def configuration(shape: Shape, **more: Any) -> dict[str, Any]:
    """``shape`` as the fields of a Hugging Face ``config.json``, with further fields ``more``."""
    return {
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_context,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": PAD_TOKEN,
        **more,
    }


def halved(module: nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    return {prefix + name: value.detach().half().contiguous() for name, value in module.state_dict().items()}


def load_target(directory: Path) -> Target:
    """A target saved by ``save_target``, in float32.

    Raises:
        TrainingError: the directory holds something else.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text())
        shape = Shape(
            config["vocab_size"],
            config["hidden_size"],
            config["intermediate_size"],
            config["num_hidden_layers"],
            config["num_attention_heads"],
            config["num_key_value_heads"],
            config["head_dim"],
            config["max_position_embeddings"],
            config["rms_norm_eps"],
            config["rope_theta"],
        )
    except (OSError, ValueError, KeyError) as cause:
        raise TrainingError(f"{path}: not the configuration of a demo target ({cause!r})") from cause
    target = Target(shape)
    fill(target, directory / "model.safetensors", "model.")
    return target


def load_head(directory: Path, shape: Shape) -> DraftHead:
    """A head saved by ``save_head`` for a target of this shape, in float32."""
    head = DraftHead(shape)
    fill(head, directory / "model.safetensors")
    return head


def fill(module: nn.Module, path: Path, prefix: str = "") -> None:
    try:
        tensors = load_file(path)
        module.load_state_dict({name.removeprefix(prefix): value.float() for name, value in tensors.items()})
    except (OSError, SafetensorError, RuntimeError) as cause:  # RuntimeError: a tensor is missing or misshapen
        raise TrainingError(f"{path}: does not hold the weights of this model ({cause})") from cause


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
