"""Has the target write texts, which its draft head is trained on because it will have to continue such texts."""

from __future__ import annotations

import torch

from exporter.training.network import Layer, Target


@torch.no_grad()
def continue_texts(
    target: Target, prompts: torch.Tensor, num_new: int, temperature: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """``prompts`` [batch, rows], each continued by ``num_new`` tokens.

    ``temperature`` [batch]: 0 takes the likeliest token.
    """
    caches = [Cache(target, prompts.shape, num_new) for _ in target.layers]
    tokens, fed = prompts, prompts
    for _ in range(num_new):
        logits = target.logits(last_rows(target, fed, tokens.shape[1] - fed.shape[1], caches))
        fed = draw(logits, temperature, generator)[:, None]
        tokens = torch.cat((tokens, fed), dim=1)
    return tokens


class Cache:
    """Keys and values of one layer, repeated for every query head."""

    def __init__(self, target: Target, prompt_shape: torch.Size, num_new: int) -> None:
        shape = target.shape
        size = (prompt_shape[0], shape.num_heads, prompt_shape[1] + num_new, shape.head_dim)
        self.keys, self.values = torch.zeros(size), torch.zeros(size)


def last_rows(target: Target, fed: torch.Tensor, start: int, caches: list[Cache]) -> torch.Tensor:
    """The normed row of the last of the tokens ``fed`` [batch, rows], whose positions begin at ``start``."""
    stop = start + fed.shape[1]
    cos, sin = target.cos[start:stop], target.sin[start:stop]
    x = target.embed_tokens(fed)
    for layer, cache in zip(target.layers, caches, strict=True):
        assert isinstance(layer, Layer)
        q, k, v = layer.self_attn.project(layer.input_layernorm(x), cos, sin)
        cache.keys[:, :, start:stop], cache.values[:, :, start:stop] = k, v
        attended = torch.nn.functional.scaled_dot_product_attention(
            q, cache.keys[:, :, :stop], cache.values[:, :, :stop], is_causal=start == 0
        )
        x = x + layer.self_attn.merge(attended)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    out: torch.Tensor = target.norm(x[:, -1])
    return out


def draw(logits: torch.Tensor, temperature: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw one token per row of ``logits`` [batch, vocabulary]."""
    scaled = logits / temperature.clamp(min=1e-3)[:, None]
    sampled = torch.multinomial(scaled.softmax(dim=-1), 1, generator=generator)[:, 0]
    return torch.where(temperature > 0, sampled, logits.argmax(dim=-1))
