"""The head's loss over several draft steps at once, each of which reads what the head itself gave one step before.

Sources: Zhang et al., "Learning Harmonized Representations for Speculative Sampling" (HASS, 2024); Li et al., "EAGLE-3"
(2025), "training-time test". In step k the row at position i stands for a draft k tokens deep: its feature is the
head's own row of step k - 1 at i - 1, and it attends to true features up to i - k and to its own k ancestors.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from exporter.training.network import DraftHead, Layer, Target

STEP_WEIGHT = 0.8  # of each draft step relative to the one before: deep drafts are reached less often
FEATURE_WEIGHT = 0.2  # of the distance to the target's own row, beside the cross-entropy


def draft_loss(head: DraftHead, target: Target, tokens: torch.Tensor, num_steps: int) -> torch.Tensor:
    """Weighted mean over ``num_steps`` draft steps for windows [batch, rows + 1]; only the head gets gradients."""
    with torch.no_grad():
        features = target.features(tokens)
        wanted = target.logits(features[:, 1:]).softmax(dim=-1)
    total = features.new_zeros(())
    for step, rows in enumerate(draft_rows(head, target, tokens, features, num_steps)):
        log_probs = target.logits(rows).log_softmax(dim=-1)
        cross_entropy = -(wanted * log_probs).sum(-1)[:, step:].mean()
        distance = functional.smooth_l1_loss(rows[:, step:], features[:, 1 + step :])
        total = total + STEP_WEIGHT**step * (cross_entropy + FEATURE_WEIGHT * distance)
    mean: torch.Tensor = total / sum(STEP_WEIGHT**step for step in range(num_steps))
    return mean


def draft_rows(
    head: DraftHead, target: Target, tokens: torch.Tensor, features: torch.Tensor, num_steps: int
) -> list[torch.Tensor]:
    """The head's rows at each step, [batch, rows, hidden_size] each. The first ``k`` rows of step k mean nothing."""
    embedded = target.embed_tokens(tokens[:, 1:]).detach()
    num_rows = embedded.shape[1]
    cos, sin = head.cos[:num_rows], head.sin[:num_rows]
    layer = head.layers[0]
    assert isinstance(layer, Layer)
    fed = features[:, :-1]
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    said = []
    for _ in range(num_steps):
        x = head.fc(torch.cat((embedded, fed), dim=-1))
        q, k, v = layer.self_attn.project(x, cos, sin)
        keys.append(k)
        values.append(v)
        x = x + layer.self_attn.merge(attend(q, keys, values))
        rows = x + layer.mlp(layer.post_attention_layernorm(x))
        said.append(rows)
        fed = shifted(rows, 1, dim=1)
    return said


def attend(q: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
    """Attention in the step ``len(keys) - 1``. All tensors are [batch, heads, rows, head_dim]."""
    step = len(keys) - 1
    if step == 0:
        return functional.scaled_dot_product_attention(q, keys[0], values[0], is_causal=True)
    rows, head_dim = q.shape[2:]
    unseen = torch.ones(rows, rows, dtype=torch.bool).triu(1 - step)  # verified rows end `step` before each draft
    verified = (q @ keys[0].transpose(2, 3)).masked_fill(unseen, float("-inf"))
    ancestors = [shifted(key, step - m, dim=2) for m, key in enumerate(keys[1:], 1)]
    own = torch.stack([(q * key).sum(-1) for key in ancestors], dim=-1)  # [batch, heads, rows, step]
    weights = (torch.cat((verified, own), dim=-1) / head_dim**0.5).softmax(dim=-1)
    out = weights[..., :rows] @ values[0]
    for m, value in enumerate(values[1:], 1):
        out = out + weights[..., rows + m - 1, None] * shifted(value, step - m, dim=2)
    attended: torch.Tensor = out
    return attended


def shifted(x: torch.Tensor, by: int, dim: int) -> torch.Tensor:
    """``x`` moved ``by`` rows later, with zeros before it."""
    if by == 0:
        return x
    kept = x.narrow(dim, 0, x.shape[dim] - by)
    return torch.cat((torch.zeros_like(x.narrow(dim, 0, by)), kept), dim=dim)
