"""Measures a demo model on held-out text: its loss, how often the head is right, the acceptance length
of whole trees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn import functional

from exporter.training.acceptance import TreeFigures
from exporter.training.batches import Batch, Texts
from exporter.training.features import Features
from exporter.training.files import load_head, open_source, read_target
from exporter.training.network import Drafting, Target
from exporter.training.recall import measure_recall
from exporter.training.text import held_out_repeats, held_out_texts, held_out_tokens

LOSS_ROWS = 512  # tokens of context; the losses in the documentation are measured with it
RECALL_ROWS, RECALL_STEPS = 256, 4
TREES = ((80, 0.0), (64, 0.6))  # nodes, temperature
NUM_PROMPTS, PROMPT_TOKENS = 20, 100


def evaluate(directory: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """Measure ``directory/target`` and ``directory/eagle`` on the held-out text.

    Raises:
        CheckpointError: there is no such target.
        TrainingError: there is no head for it, or this Python lacks held-out files.
    """
    target = read_target(open_source(directory / "target"))
    drafting = Drafting(target, load_head(directory / "eagle", target.shape))
    tokenizer = Tokenizer.from_file(str(directory / "target/tokenizer.json"))
    tokens = held_out_tokens(tokenizer)
    losses = token_losses(target, Texts.in_windows(tokens, LOSS_ROWS))
    is_new = ~held_out_repeats(tokenizer)[1 : len(losses) + 1]
    loss, loss_on_new = float(losses.mean()), float(losses[is_new].mean())
    report(
        f"held-out loss {loss:.4f} nats per token; {loss_on_new:.4f} on the {is_new.mean():.0%} "
        "that no file of the training text repeats"
    )
    recall = measure_recall(drafting, in_fours(target, Texts.in_windows(tokens, RECALL_ROWS)), RECALL_STEPS).shares()
    for depth, by_rank in enumerate(recall, 1):
        shares = ", ".join(f"top {rank}: {share:.3f}" for rank, share in by_rank.items())
        report(f"target's likeliest token among the head's at depth {depth}: {shares}")
    prompts = list(held_out_prompts(tokenizer.encode("".join(held_out_texts().values())).ids))
    trees = []
    for num_nodes, temperature in TREES:
        figures = TreeFigures.of(drafting, prompts, num_nodes, temperature)
        trees.append(figures.as_json())
        report(str(figures))
    return {"held_out_loss": loss, "held_out_loss_on_new": loss_on_new, "recall": recall, "trees": trees}


@torch.no_grad()
def token_losses(target: Target, texts: Texts) -> np.ndarray:
    """Nats of each token but the first, in order, of texts that share a token with the next one."""
    losses = []
    for number in range(len(texts)):
        window = texts.batch([number]).tokens
        logits = target.logits(target.features(window[:, :-1]))[0]
        losses.append(functional.cross_entropy(logits, window[0, 1:], reduction="none"))
    return torch.cat(losses).double().numpy()


def in_fours(target: Target, texts: Texts) -> Iterator[tuple[Batch, torch.Tensor]]:
    """All texts with their features."""
    features = Features(target, texts)
    for first in range(0, len(texts), 4):
        batch = texts.batch(range(first, min(first + 4, len(texts))))
        yield batch, features.batch(batch)


def held_out_prompts(tokens: list[int]) -> Iterator[list[int]]:
    """Prompts of 100 tokens, spread evenly over the held-out stream."""
    step = len(tokens) // NUM_PROMPTS
    for start in range(0, step * NUM_PROMPTS, step):
        yield tokens[start : start + PROMPT_TOKENS]
