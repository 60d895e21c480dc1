"""Measures a demo model on held-out text: its loss, how often the head is right, the acceptance length
of whole trees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn import functional

from exporter.training.acceptance import NEW_TOKENS, Speculation, Written, held_out_prompts
from exporter.training.batches import in_windows
from exporter.training.draft_loss import draft_rows
from exporter.training.network import DraftHead, Target, load_head, load_target
from exporter.training.text import held_out_repeats, held_out_texts, held_out_tokens

LOSS_ROWS = 512  # tokens of context; the losses in the documentation are measured with it
RECALL_ROWS = 256
TREES = ((80, 0.0), (64, 0.6))  # nodes, temperature
RANKS = (1, 3, 10)


@dataclass(frozen=True)
class TreeFigures:
    """Figures of the trees of one size.

    ``acceptance_length`` = tokens / verifications, bonus included, mean of the prompts.
    """

    num_nodes: int
    temperature: float
    acceptance_length: float
    not_looping: float
    num_not_looping: int
    num_prompts: int


def evaluate(directory: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """Measure ``directory/target`` and ``directory/eagle`` on the held-out text.

    Raises:
        TrainingError: the directory is not a demo model, or this Python lacks held-out files.
    """
    target = load_target(directory / "target")
    head = load_head(directory / "eagle", target.shape)
    tokenizer = Tokenizer.from_file(str(directory / "target/tokenizer.json"))
    tokens = held_out_tokens(tokenizer)
    losses = token_losses(target, in_windows(tokens, LOSS_ROWS))
    is_new = ~held_out_repeats(tokenizer)[1 : len(losses) + 1]
    loss, loss_on_new = float(losses.mean()), float(losses[is_new].mean())
    report(
        f"held-out loss {loss:.4f} nats per token; {loss_on_new:.4f} on the {is_new.mean():.0%} "
        "that no file of the training text repeats"
    )
    recall = recalls(target, head, in_windows(tokens, RECALL_ROWS))
    for depth, by_rank in enumerate(recall, 1):
        shares = ", ".join(f"top {rank}: {share:.3f}" for rank, share in by_rank.items())
        report(f"target's likeliest token among the head's at depth {depth}: {shares}")
    prompts = list(held_out_prompts(tokenizer.encode("".join(held_out_texts().values())).ids))
    trees = []
    for num_nodes, temperature in TREES:
        figures = tree_figures(target, head, prompts, num_nodes, temperature)
        trees.append(asdict(figures))
        report(
            f"{num_nodes} nodes, T={temperature:g}: acceptance length {figures.acceptance_length:.2f} on "
            f"{figures.num_prompts} prompts, {figures.not_looping:.2f} on the {figures.num_not_looping} that do not "
            "loop"
        )
    return {"held_out_loss": loss, "held_out_loss_on_new": loss_on_new, "recall": recall, "trees": trees}


@torch.no_grad()
def token_losses(target: Target, windows: torch.Tensor) -> np.ndarray:
    """Nats of each token of ``windows`` but the first, in order."""
    losses = [
        functional.cross_entropy(target.logits(target.features(window[None, :-1]))[0], window[1:], reduction="none")
        for window in windows
    ]
    return torch.cat(losses).double().numpy()


def tree_figures(
    target: Target, head: DraftHead, prompts: list[list[int]], num_nodes: int, temperature: float
) -> TreeFigures:
    texts = [
        Speculation(target, head, num_nodes, temperature, seed).write(prompt, NEW_TOKENS)
        for seed, prompt in enumerate(prompts)
    ]
    varied = [text for text in texts if not text.is_looping]
    return TreeFigures(num_nodes, temperature, mean_length(texts), mean_length(varied), len(varied), len(texts))


def mean_length(texts: list[Written]) -> float:
    return sum(text.acceptance_length for text in texts) / max(1, len(texts))


@torch.no_grad()
def recalls(target: Target, head: DraftHead, windows: torch.Tensor, num_steps: int = 4) -> list[dict[int, float]]:
    """How often the target's likeliest token is among the head's 1, 3 and 10 likeliest, for each draft depth."""
    hits = torch.zeros(num_steps, max(RANKS))
    counts = torch.zeros(num_steps)
    for window in windows.split(4):
        features = target.features(window)
        wanted = target.logits(features[:, 1:]).argmax(dim=-1)
        for step, rows in enumerate(draft_rows(head, target, window, features, num_steps)):
            top = target.logits(rows[:, step:]).topk(max(RANKS)).indices
            hits[step] += (top == wanted[:, step:, None]).float().sum((0, 1))
            counts[step] += wanted[:, step:].numel()
    shares = hits.cumsum(dim=1) / counts[:, None]
    return [{rank: float(row[rank - 1]) for rank in RANKS} for row in shares]
