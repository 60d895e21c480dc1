"""Draws: the target's own distribution, and what a draft may know of them beforehand."""

import numpy as np
import pytest

from flowspec_edge.config import GenerateOptions
from flowspec_edge.core.rows import NO_PARENT, Row
from flowspec_edge.core.speculation.drafting import Drafting, DraftShape
from flowspec_edge.core.speculation.tree import Tree
from flowspec_edge.core.speculation.verify import Sampler, next_token_distribution

VOCAB = 40
LOGITS = np.random.default_rng(1).normal(size=VOCAB).astype(np.float32) * 2
LOG_PROBS = LOGITS - np.log(np.exp(LOGITS).sum())
TOKENS = np.argsort(-LOGITS)
CHI_SQUARE_999 = {5: 20.52, 39: 72.05}
"""99.9 % quantiles of the chi-squared distribution, by degrees of freedom."""


def foreseen(sampler: Sampler, position: int) -> np.ndarray:
    """Log-chances of all tokens at a position, as a draft that equals the target sees them."""
    chances: np.ndarray = sampler.foresee(TOKENS[None], LOG_PROBS[TOKENS][None], [position])[0]
    return chances


@pytest.mark.parametrize(("top_k", "num_free"), [(0, 39), (6, 5)])
def test_draws_follow_the_distribution(top_k: int, num_free: int) -> None:
    options = GenerateOptions(temperature=2.0, top_k=top_k, seed=11)
    num_draws = 8_000
    sampler = Sampler(options, VOCAB)
    counts = np.bincount([sampler.draw(LOGITS, position) for position in range(num_draws)], minlength=VOCAB)
    expected = next_token_distribution(LOGITS, options) * num_draws
    kept = expected > 0
    assert counts[~kept].sum() == 0
    assert expected[kept].min() > 5, "too rare for a chi-square test"
    assert ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum() < CHI_SQUARE_999[num_free]


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    options = GenerateOptions(temperature=1.0, seed=3)
    there = [Sampler(options, VOCAB).draw(LOGITS, position) for position in range(50)]
    sampler = Sampler(options, VOCAB)
    assert [sampler.draw(LOGITS, position) for position in reversed(range(50))] == there[::-1]
    other = Sampler(GenerateOptions(temperature=1.0, seed=4), VOCAB)
    assert [other.draw(LOGITS, position) for position in range(50)] != there


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 2.0])
def test_a_draft_that_equals_the_target_foresees_every_draw(temperature: float) -> None:
    sampler = Sampler(GenerateOptions(temperature=temperature, seed=5), VOCAB)
    for position in range(200):
        chances = foreseen(sampler, position)
        assert TOKENS[np.argmax(chances)] == sampler.draw(LOGITS, position)
        assert np.exp(chances).sum() < 1 + 1e-5


def test_luck_does_not_help_a_token_that_is_cut_off() -> None:
    def share_in_first_three(options: GenerateOptions) -> float:
        sampler = Sampler(options, VOCAB)
        best = [np.argmax(foreseen(sampler, position)) for position in range(200)]
        return float(np.mean(np.array(best) < 3))

    assert share_in_first_three(GenerateOptions(temperature=8.0)) < 0.3
    assert share_in_first_three(GenerateOptions(temperature=8.0, top_k=3)) > 0.8
    assert share_in_first_three(GenerateOptions(temperature=8.0, top_p=0.1)) > 0.8


def test_the_likeliest_child_is_the_one_that_will_be_drawn() -> None:
    """This holds also where the draft itself ranks other tokens first."""
    sampler = Sampler(GenerateOptions(temperature=1.0, seed=7), VOCAB)
    tree = Tree()
    tree.add(Row(0, NO_PARENT, 1))
    drafting = Drafting(tree, DraftShape(proposals=VOCAB, children=2), sampler=sampler)
    at, surprises = 0, 0
    for depth in range(1, 30):
        added = drafting.merge([at], TOKENS[None], LOG_PROBS[TOKENS][None], at + 1 + 2 * depth)
        assert len(added) == 2
        drawn = sampler.draw(LOGITS, depth)
        best = max(added, key=lambda row: drafting.scores[row.id])
        assert best.token == drawn
        surprises += drawn not in TOKENS[:2]
        at = best.id
    assert surprises > 3
