"""Draws: the target's own distribution, and what a draft may know of them beforehand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flowspec_edge.config import GenerateOptions
from flowspec_edge.core import events as ev
from flowspec_edge.core.rows import NO_PARENT, Row
from flowspec_edge.core.speculation.drafting import Drafting, DraftShape
from flowspec_edge.core.speculation.tree import Tree
from flowspec_edge.core.speculation.verify import Sampler, draw_tokens, next_token_distribution, noise_of, rank_drafts

VOCAB = 40
NOISE = noise_of(VOCAB)
LOGITS = np.random.default_rng(1).normal(size=VOCAB).astype(np.float32) * 2
LOG_PROBS = LOGITS - np.log(np.exp(LOGITS).sum())
TOKENS = np.argsort(-LOGITS)
DRAFTED = ev.DraftFinished(TOKENS[None], LOG_PROBS[TOKENS][None])
HIDDEN = np.zeros((5, 1), np.float32)
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
    sampler = Sampler(options, NOISE)
    counts = np.bincount([sampler.draw(LOGITS, position) for position in range(num_draws)], minlength=VOCAB)
    expected = next_token_distribution(LOGITS, options) * num_draws
    kept = expected > 0
    assert counts[~kept].sum() == 0
    assert expected[kept].min() > 5, "too rare for a chi-square test"
    assert ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum() < CHI_SQUARE_999[num_free]


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    options = GenerateOptions(temperature=1.0, seed=3)
    there = [Sampler(options, NOISE).draw(LOGITS, position) for position in range(50)]
    sampler = Sampler(options, NOISE)
    assert [sampler.draw(LOGITS, position) for position in reversed(range(50))] == there[::-1]
    other = Sampler(GenerateOptions(temperature=1.0, seed=4), NOISE)
    assert [other.draw(LOGITS, position) for position in range(50)] != there


def test_tokens_that_are_hardly_possible_are_drawn_from_without_a_warning() -> None:
    sampler = Sampler(GenerateOptions(temperature=1.0), noise_of(4096))
    logits = np.full(4096, -744.0, np.float32)  # the least probability above 0
    logits[7] = 0.0
    with np.errstate(over="raise"):
        assert sampler.draw(logits, 1) == 7


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 2.0])
def test_a_draft_that_equals_the_target_foresees_every_draw(temperature: float) -> None:
    sampler = Sampler(GenerateOptions(temperature=temperature, seed=5), NOISE)
    for position in range(200):
        chances = foreseen(sampler, position)
        assert TOKENS[np.argmax(chances)] == sampler.draw(LOGITS, position)
        assert np.exp(chances).sum() < 1 + 1e-5


def test_luck_does_not_help_a_token_that_is_cut_off() -> None:
    def share_in_first_three(options: GenerateOptions) -> float:
        sampler = Sampler(options, NOISE)
        best = [np.argmax(foreseen(sampler, position)) for position in range(200)]
        return float(np.mean(np.array(best) < 3))

    assert share_in_first_three(GenerateOptions(temperature=8.0)) < 0.3
    assert share_in_first_three(GenerateOptions(temperature=8.0, top_k=3)) > 0.8
    assert share_in_first_three(GenerateOptions(temperature=8.0, top_p=0.1)) > 0.8


def test_the_likeliest_child_is_the_one_that_will_be_drawn() -> None:
    """This holds also where the draft itself ranks other tokens first."""
    options = GenerateOptions(temperature=1.0, seed=7)
    sampler = Sampler(options, NOISE)
    tree = Tree()
    tree.add(Row(0, NO_PARENT, 1))
    drafting = Drafting(tree, DraftShape(proposals=VOCAB, children=2))
    drafting.move_root(0, (1,), 1)
    at, surprises = 0, 0
    for depth in range(1, 30):
        ranked = rank_drafts(draft_below(at, depth, options), DRAFTED, NOISE)
        added = drafting.merge([at], ranked.tokens, ranked.log_probs, at + 1 + 2 * depth)
        assert len(added) == 2
        drawn = sampler.draw(LOGITS, depth)
        scores = drafting.scores
        best = max(added, key=lambda row: scores[row.id])
        assert best.token == drawn
        surprises += drawn not in TOKENS[:2]
        at = best.id
    assert surprises > 3


def draft_below(row: int, depth: int, options: GenerateOptions | None) -> ev.RunDraft:
    """A pass over one drafted row, whose children have this position."""
    return ev.RunDraft(1, (Row(row, 0, 1),), np.array([depth - 2]), np.zeros((0, 0), np.float32), (), options)


def test_without_options_drafts_stay_as_they_are() -> None:
    assert rank_drafts(draft_below(5, 3, None), DRAFTED, NOISE) is DRAFTED


def test_of_a_pass_over_verified_pairs_the_last_and_the_drafted_rows_are_ranked() -> None:
    """Each at the position of its own children."""
    options = GenerateOptions(temperature=1.0, seed=7)
    rows = (Row(1, 0, 3), Row(2, 1, 4), Row(3, 2, 5), Row(4, 3, 6))
    job = ev.RunDraft(1, rows, np.arange(4), np.zeros((3, 1), np.float32), (), options)
    drafted = ev.DraftFinished(np.tile(TOKENS, (2, 1)), np.tile(LOG_PROBS[TOKENS], (2, 1)))
    ranked = rank_drafts(job, drafted, NOISE)
    drawn = [Sampler(options, NOISE).draw(LOGITS, position) for position in (4, 5)]
    assert drawn[0] != drawn[1]
    assert ranked.tokens[:, 0].tolist() == drawn
    assert (np.diff(ranked.log_probs, axis=1) <= 0).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_drawn_below_those_that_were_drawn(temperature: float) -> None:
    options = GenerateOptions(temperature=temperature, seed=7)
    first = Sampler(options, NOISE).draw(LOGITS, 5)
    other = (first + 1) % VOCAB
    rows = (Row(4, 3, 9), Row(5, 4, first), Row(6, 4, other), Row(7, 6, 2), Row(8, 1, 2))
    positions = (4, 5, 5, 6, 5)
    drawn = draw_tokens(ev.RunHead(1, rows, positions, HIDDEN, options), np.tile(LOGITS, (5, 1)), NOISE)
    second = Sampler(options, NOISE).draw(LOGITS, 6)
    assert drawn.tokens == (first, second, None, None, second), "row 8 hangs below a row that is not here"


def distribution_by_sorting_all(logits: NDArray[np.float32], options: GenerateOptions) -> NDArray[np.float64]:
    """What ``next_token_distribution`` says, as it is defined: all tokens are ranked."""
    scaled = logits.astype(np.float64) / options.temperature
    probabilities: NDArray[np.float64] = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    if 0 < options.top_k < len(probabilities) or options.top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        kept = len(order) if options.top_k == 0 else min(options.top_k, len(order))
        if options.top_p < 1:
            cumulative = np.cumsum(probabilities[order[:kept]])
            kept = min(kept, int(np.searchsorted(cumulative, options.top_p * cumulative[-1])) + 1)
        probabilities[order[kept:]] = 0.0
        probabilities /= probabilities.sum()
    return probabilities


NEAR_CUTS = [0.25, 0.5, 0.75, 0.9, 1e-12, 1 - 1e-6, 1 - 1e-12, float(np.nextafter(1.0, 0.0)), 1.0]


@settings(max_examples=600, deadline=None)
@given(
    num_tokens=st.one_of(st.integers(1, 200), st.sampled_from([2048, 5000])),
    seed=st.integers(0, 2**32),
    spread=st.sampled_from([0.0, 0.01, 1.0, 5.0, 40.0]),
    digits=st.sampled_from([0, 1, 6]),  # few digits make many ties
    share_impossible=st.sampled_from([0.0, 0.5]),
    top_k=st.one_of(st.just(0), st.integers(1, 300)),
    top_p=st.one_of(st.sampled_from(NEAR_CUTS), st.floats(1e-9, 1.0)),
    temperature=st.sampled_from([0.05, 0.6, 1.0, 10.0]),
)
def test_what_is_not_sorted_changes_no_bit(
    num_tokens: int,
    seed: int,
    spread: float,
    digits: int,
    share_impossible: float,
    top_k: int,
    top_p: float,
    temperature: float,
) -> None:
    random = np.random.default_rng(seed)
    logits = np.round(random.standard_normal(num_tokens) * spread, digits).astype(np.float32)
    logits[1:][random.random(num_tokens - 1) < share_impossible] = -np.inf
    options = GenerateOptions(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    expected = distribution_by_sorting_all(logits, options)
    np.testing.assert_array_equal(next_token_distribution(logits, options), expected)
    kept = np.flatnonzero(expected)
    times = noise_of(num_tokens)(seed, 7)[kept] / expected[kept]
    assert Sampler(options, noise_of(num_tokens)).draw(logits, 7) == kept[np.argmin(times)]


def test_a_cut_that_falls_between_equal_tokens_is_where_it_was() -> None:
    """Where all tokens are equal, the last digit of the sum over all of them decides."""
    for num_tokens in range(2, 300):
        logits = np.zeros(num_tokens, np.float32)
        for top_p in (0.5, 0.25, 1 / 3, 0.1, 0.9):
            options = GenerateOptions(temperature=1.0, top_p=top_p)
            found = next_token_distribution(logits, options)
            np.testing.assert_array_equal(found, distribution_by_sorting_all(logits, options))
