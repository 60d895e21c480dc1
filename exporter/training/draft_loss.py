"""The head's loss over several draft steps at once, each of which reads what the head itself gave one step before.

Sources: Zhang et al., "Learning Harmonized Representations for Speculative Sampling" (HASS, 2024); Li et al., "EAGLE-3"
(2025), "training-time test". In step k the row at position i stands for a draft k tokens deep: its feature is the
head's own row of step k - 1 at i - 1, and it attends to true features up to i - k and to its own k ancestors.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from exporter.training.batches import Batch
from exporter.training.network import Attention, Drafting, share

STEP_WEIGHT = 0.8  # of each draft step relative to the one before: deep drafts are reached less often
FEATURE_WEIGHT = 0.2  # of the distance to the target's own row, in units of its RMS, beside the cross-entropy


def draft_loss(drafting: Drafting, batch: Batch, features: torch.Tensor, num_steps: int) -> torch.Tensor:
    """Weighted mean over ``num_steps`` draft steps of a batch with its ``features``; only the head gets gradients.

    Rows count whose next token but one is to be learned and is drafted; so of two distributions over what is drafted
    the one that the target seldom draws from weighs less.
    """
    tokens = batch.tokens.to(features.device)
    weights = learned_rows(drafting, batch).to(features.device).float()
    with torch.no_grad():
        wanted = drafting.log_probs(features[:, 1:]).exp()
        scale = features[:, 1:][weights > 0].pow(2).mean().sqrt().clamp(min=1e-6)
    total = features.new_zeros(())
    for step, rows in enumerate(draft_rows(drafting, tokens, features, num_steps)):
        share_of = weights[:, step:] / weights[:, step:].sum().clamp(min=1.0)
        cross_entropy = -(wanted[:, step:] * drafting.log_probs(rows[:, step:])).sum(-1)
        found, true = rows[:, step:] / scale, features[:, 1 + step :] / scale
        distance = functional.smooth_l1_loss(found, true, reduction="none").mean(-1)
        total = total + STEP_WEIGHT**step * (share_of * (cross_entropy + FEATURE_WEIGHT * distance)).sum()
    mean: torch.Tensor = total / sum(STEP_WEIGHT**step for step in range(num_steps))
    return mean


def learned_rows(drafting: Drafting, batch: Batch) -> torch.Tensor:
    """Which rows count: bool [texts, longest - 1]. The last row of a text drafts a token that is not known."""
    is_learned = batch.is_learned() & drafting.is_drafted.cpu()[batch.tokens]
    return functional.pad(is_learned[:, 2:], (0, 1))


def draft_rows(drafting: Drafting, tokens: torch.Tensor, features: torch.Tensor, num_steps: int) -> list[torch.Tensor]:
    """The head's rows at each step, [batch, rows, hidden_size] each. The first ``k`` rows of step k mean nothing."""
    head, num_rows = drafting.head, tokens.shape[1] - 1
    rotations = head.rotations(torch.arange(num_rows, device=features.device))
    (layer,) = head.stack
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []

    def attend(attention: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        group = q.shape[1] // k.shape[1]
        keys.append(share(k, group))
        values.append(share(v, group))
        return attend_in_steps(q, keys, values)

    fed = features[:, :-1]
    said = []
    for _ in range(num_steps):
        rows = layer(drafting.fuse(tokens[:, 1:], fed), rotations, attend)
        said.append(rows)
        fed = shifted(rows, 1, dim=1)
    return said


def attend_in_steps(q: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
    """Attention in the step ``len(keys) - 1`` of scaled queries. All tensors are [batch, heads, rows, head_dim]."""
    step = len(keys) - 1
    if step == 0:
        return functional.scaled_dot_product_attention(q, keys[0], values[0], is_causal=True, scale=1.0)
    rows = q.shape[2]
    # Verified rows end `step` before each draft.
    unseen = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1 - step)
    verified = (q @ keys[0].transpose(2, 3)).masked_fill(unseen, float("-inf"))
    ancestors = [shifted(key, step - m, dim=2) for m, key in enumerate(keys[1:], 1)]
    own = torch.stack([(q * key).sum(-1) for key in ancestors], dim=-1)  # [batch, heads, rows, step]
    weights = torch.cat((verified, own), dim=-1).softmax(dim=-1)
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
