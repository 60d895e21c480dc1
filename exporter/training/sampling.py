"""Has the target write texts, which its draft head is trained on because it will have to continue such texts."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from exporter.training.cached import CachedLayers
from exporter.training.network import Target


@torch.no_grad()
def continue_texts(
    target: Target,
    prompts: Sequence[Sequence[int]],
    most: int,
    temperature: torch.Tensor,
    generator: torch.Generator,
    ends: Collection[int] = (),
) -> list[list[int]]:
    """``prompts``, each continued to ``most`` tokens, or to the first of the tokens ``ends``.

    ``temperature`` [texts]: 0 takes the likeliest token.
    """
    texts = [list(prompt) for prompt in prompts]
    longest, device = max(map(len, prompts)), target.device
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)  # before each prompt
    fed = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    cached, alive = CachedLayers(target, len(texts)), list(range(len(texts)))
    while True:
        rows = last_rows(target, cached, fed, padding)
        drawn = draw(target.logits(rows).cpu(), temperature[alive], generator)
        for text, token in zip(alive, drawn.tolist(), strict=True):
            texts[text].append(token)
        going = [at for at, text in enumerate(alive) if len(texts[text]) < most and texts[text][-1] not in ends]
        if not going:
            return texts
        if len(going) < len(alive):
            cached.keep_texts(going)
            alive, padding, drawn = [alive[at] for at in going], padding[going], drawn[going]
        fed = drawn[:, None].to(device)


def last_rows(target: Target, cached: CachedLayers, fed: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """The normed rows of the last of the tokens ``fed`` [texts, rows], of texts with ``padding`` before them."""
    start, stop = len(cached), len(cached) + fed.shape[1]
    rows, slots = torch.arange(start, stop, device=fed.device), torch.arange(stop, device=fed.device)
    is_text = slots >= padding[:, None, None]  # [texts, 1, slots]
    seen = (is_text & (slots <= rows[:, None])) | (slots == rows[:, None])  # padding sees itself, or it were NaN
    positions = (rows - padding[:, None]).clamp(min=0)
    out = cached.run(target.embed(fed), positions[:, None], seen[:, None])
    normed: torch.Tensor = target.norm(out[:, -1])
    return normed


def draw(logits: torch.Tensor, temperature: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw one token per row of ``logits`` [batch, vocabulary]."""
    scaled = logits / temperature.clamp(min=1e-3)[:, None]
    sampled = torch.multinomial(scaled.softmax(dim=-1), 1, generator=generator)[:, 0]
    return torch.where(temperature > 0, sampled, logits.argmax(dim=-1))
