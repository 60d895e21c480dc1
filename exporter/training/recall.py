"""How often a head guesses what its target would write, by the depth of the draft."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from exporter.training.batches import Batch
from exporter.training.draft_loss import draft_rows
from exporter.training.network import Drafting

RANKS = (1, 3, 10)


@dataclass(frozen=True)
class Recall:
    """Sums over rows, which those of several workers may be added to.

    Attributes:
        hits: how often the target's likeliest token was among the head's 1, 2, ... likeliest, [depths, max(RANKS)].
        counts: of rows, [depths].
        chains: tokens of chains that are as long as there are depths, bonus included, and their number: [2].
    """

    hits: torch.Tensor
    counts: torch.Tensor
    chains: torch.Tensor

    @property
    def tokens_per_chain(self) -> float:
        """Tokens per verification of a chain of the head's likeliest tokens, bonus included."""
        return float(self.chains[0] / self.chains[1].clamp(min=1))

    def shares(self) -> list[dict[int, float]]:
        """Of each depth, by rank."""
        shares = self.hits.cumsum(dim=1) / self.counts[:, None].clamp(min=1)
        return [{rank: float(row[rank - 1]) for rank in RANKS} for row in shares]


@torch.no_grad()
def measure_recall(drafting: Drafting, batches: Iterable[tuple[Batch, torch.Tensor]], num_steps: int) -> Recall:
    """Of batches with their features, [texts, longest, hidden_size]."""
    hits = torch.zeros(num_steps, max(RANKS), dtype=torch.float64)
    counts = torch.zeros(num_steps, dtype=torch.float64)
    chains = torch.zeros(2, dtype=torch.float64)
    for batch, features in batches:
        wanted = drafting.target.logits(features[:, 1:]).argmax(dim=-1)
        places = torch.arange(wanted.shape[1])
        is_counted = (places + 2 >= batch.trained_from[:, None]) & (places + 1 < batch.lengths[:, None])
        last = wanted.shape[1] - num_steps + 1
        is_root = is_counted[:, :last] & is_counted[:, num_steps - 1 :]
        accepted = is_root
        chains += torch.tensor([float(is_root.sum())] * 2)
        tokens = batch.tokens.to(features.device)
        for step, rows in enumerate(draft_rows(drafting, tokens, features, num_steps)):
            top = drafting.tokens[drafting.log_probs(rows).topk(max(RANKS)).indices]
            is_hit = (top == wanted[..., None]).cpu()  # [texts, rows, ranks]
            hits[step] += is_hit[:, step:][is_counted[:, step:]].sum(0)
            counts[step] += is_counted[:, step:].sum()
            accepted = accepted & is_hit[:, step : step + last, 0]
            chains[0] += accepted.sum()
    return Recall(hits, counts, chains)
