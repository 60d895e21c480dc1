"""Measures how many tokens one verification of a whole draft tree gives: the figure by which target and head are
judged.

The tree is that of Li et al., "EAGLE-2" (2024): in each pass the ``WIDTH`` likeliest leaves grow ``WIDTH`` children
each. Of all passes, the nodes with the largest product of probabilities are verified.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import torch

from exporter.training.cached import CachedLayers
from exporter.training.network import Drafting
from exporter.training.sampling import continue_texts

WIDTH = 10
DEPTH = 6
NEW_TOKENS = 128
RUN_TOKENS, LEAST_DISTINCT = 8, 0.7  # a text loops when under 70 % of its runs of 8 tokens are distinct


@dataclass(frozen=True)
class Written:
    """One text, and how many verifications it took."""

    tokens: list[int]
    num_verifications: int

    @property
    def acceptance_length(self) -> float:
        """Tokens per verification, bonus included; the first token comes from the prompt's own pass."""
        return (len(self.tokens) - 1) / max(1, self.num_verifications)

    @property
    def is_looping(self) -> bool:
        runs = [tuple(self.tokens[i : i + RUN_TOKENS]) for i in range(len(self.tokens) - RUN_TOKENS)]
        return len(set(runs)) < LEAST_DISTINCT * len(runs)


@dataclass
class Node:
    """A drafted token. In every list of nodes parents come before their children."""

    token: int
    parent: int  # place in the list; -1 for the root's own children
    depth: int  # 1 for the root's children
    score: float  # log-probability of the path from the root


class Speculation:
    """Draft trees of ``num_nodes`` nodes along one text that the target has written.

    Trees change no token of a text, so it is written first, together with others, and run through the target once: what
    is left of a verification is whether the text goes on through the tree.
    """

    def __init__(self, drafting: Drafting, num_nodes: int) -> None:
        self.drafting, self.num_nodes = drafting, num_nodes
        self.drafted = CachedLayers(drafting.head)

    @torch.no_grad()
    def count_verifications(self, tokens: list[int], num_prompt: int) -> int:
        """How many trees are verified until all ``tokens`` are there.

        ``num_prompt`` of them are the prompt; the one behind it comes with the prompt's own pass.
        """
        features = self.drafting.target.features(self._tensor([tokens]))[0]
        at, last = num_prompt, len(tokens) - 1
        rows, num_verifications = features[:at], 0  # of the tokens before the last one that is known
        while at < last:
            nodes = self._draft(tokens[: at + 1], rows)
            num_verifications += 1
            gained = 1 + matched(nodes, tokens[at + 1 : last])  # the target's own token behind the path comes with it
            rows, at = features[at : at + gained], at + gained
        return num_verifications

    def _draft(self, tokens: list[int], features: torch.Tensor) -> list[Node]:
        """The tree below the last of ``tokens``; ``features`` are the rows of the tokens just before that one."""
        kept, length = len(self.drafted), len(features)
        fed = tokens[kept + 1 : kept + 1 + length]
        seen = torch.ones(length, kept + length, dtype=torch.bool).tril(kept)
        rows = self._head(self._tensor(fed), features, torch.arange(kept, kept + length), seen)
        committed = kept + length
        nodes: list[Node] = []
        said: dict[int, torch.Tensor] = {}
        slots: dict[int, list[int]] = {-1: []}
        self._grow(nodes, {-1: rows[-1]})
        for depth in range(1, DEPTH):
            leaves = sorted((i for i, node in enumerate(nodes) if node.depth == depth), key=lambda i: -nodes[i].score)[
                :WIDTH
            ]
            before = len(self.drafted)
            seen = torch.zeros(len(leaves), before + len(leaves), dtype=torch.bool)
            seen[:, :committed] = True
            for row, leaf in enumerate(leaves):
                slots[leaf] = [*slots[nodes[leaf].parent], before + row]
                seen[row, slots[leaf]] = True
            parents = torch.stack([said.get(nodes[leaf].parent, rows[-1]) for leaf in leaves])
            place = torch.full((len(leaves),), committed - 1 + depth)
            out = self._head(self._tensor([nodes[leaf].token for leaf in leaves]), parents, place, seen)
            said.update(zip(leaves, out, strict=True))
            self._grow(nodes, dict(zip(leaves, out, strict=True)))
        self.drafted.keep_slots(list(range(committed)))
        return self._best(nodes)

    def _head(
        self, tokens: torch.Tensor, features: torch.Tensor, positions: torch.Tensor, seen: torch.Tensor
    ) -> torch.Tensor:
        x = self.drafting.fuse(tokens, features)[None]
        return self.drafted.run(x, positions.to(x.device), seen.to(x.device))[0]

    def _grow(self, nodes: list[Node], rows: dict[int, torch.Tensor]) -> None:
        """Add the ``WIDTH`` likeliest children of each node in ``rows`` to ``nodes``."""
        top = self.drafting.log_probs(torch.stack(list(rows.values()))).topk(WIDTH)
        tokens = self.drafting.tokens[top.indices]
        for parent, scores, children in zip(rows, top.values.tolist(), tokens.tolist(), strict=True):
            above, depth = (nodes[parent].score, nodes[parent].depth) if parent >= 0 else (0.0, 0)
            nodes.extend(Node(t, parent, depth + 1, above + s) for t, s in zip(children, scores, strict=True))

    def _best(self, nodes: list[Node]) -> list[Node]:
        """The likeliest nodes in their order.

        A parent is never less likely than its child, so each one's parent is there.
        """
        chosen = sorted(sorted(range(len(nodes)), key=lambda i: (-nodes[i].score, i))[: self.num_nodes])
        place = {-1: -1} | {i: new for new, i in enumerate(chosen)}
        return [Node(nodes[i].token, place[nodes[i].parent], nodes[i].depth, nodes[i].score) for i in chosen]

    def _tensor(self, values: list[Any]) -> torch.Tensor:
        return torch.tensor(values, device=self.drafting.target.device)


def matched(nodes: list[Node], tokens: list[int]) -> int:
    """How many of ``tokens`` in a row a path from the root of a tree has."""
    children = {(node.parent, node.token): place for place, node in enumerate(nodes)}
    parent, depth = -1, 0
    for token in tokens:
        if (parent, token) not in children:
            break
        parent, depth = children[parent, token], depth + 1
    return depth


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

    @classmethod
    def of(
        cls,
        drafting: Drafting,
        prompts: list[list[int]],
        num_nodes: int,
        temperature: float,
        ends: Collection[int] = (0,),
        num_new: int = NEW_TOKENS,
    ) -> TreeFigures:
        longest, generator = max(map(len, prompts)), torch.Generator().manual_seed(0)
        temperatures = torch.full((len(prompts),), temperature)
        written = continue_texts(drafting.target, prompts, longest + num_new, temperatures, generator, ends)
        texts = []
        for prompt, tokens in zip(prompts, written, strict=True):
            kept, start = tokens[: len(prompt) + num_new], len(prompt)
            texts.append(Written(kept[start:], Speculation(drafting, num_nodes).count_verifications(kept, start)))
        varied = [text for text in texts if not text.is_looping]
        return cls(num_nodes, temperature, _mean_length(texts), _mean_length(varied), len(varied), len(texts))

    def __str__(self) -> str:
        return (
            f"{self.num_nodes} nodes, T={self.temperature:g}: acceptance length {self.acceptance_length:.2f} on "
            f"{self.num_prompts} prompts, {self.not_looping:.2f} on the {self.num_not_looping} that do not loop"
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def _mean_length(texts: list[Written]) -> float:
    return sum(text.acceptance_length for text in texts) / max(1, len(texts))
