"""Biases and penalties, against their definitions and against transformers' processors."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowspec_edge.config import GenerateOptions
from flowspec_edge.core import events as ev
from flowspec_edge.core.rows import NO_PARENT, Before, Floats, Paths, Row
from flowspec_edge.core.speculation.penalties import penalised, penalised_drafts
from flowspec_edge.core.speculation.text_paths import TextPaths
from flowspec_edge.core.speculation.tree import Tree
from flowspec_edge.core.speculation.verify import draw_tokens, next_token_distribution, noise_of, rank_drafts
from flowspec_edge.errors import FieldError

VOCAB = 30
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=40)
LOGITS = st.integers(0, 2**32).map(
    lambda seed: (np.random.default_rng(seed).standard_normal(VOCAB) * 4).astype(np.float32)
)
OPTIONS = st.builds(
    GenerateOptions,
    temperature=st.sampled_from([0.5, 1.0]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.9]),
    min_p=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 0.7, 1.2, 2.0]),
    presence_penalty=st.sampled_from([0.0, 1.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.4, -0.3]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=4).map(
        lambda biases: tuple(biases.items())
    ),
    min_tokens=st.sampled_from([0, 5]),
    stop_token_ids=st.just((2, 9)),
)


def before(prompt: list[int], written: list[int]) -> Before:
    return Before(np.array([*prompt, *written], np.int64), len(prompt))


def by_definition(logits: Floats, options: GenerateOptions, prompt: list[int], written: list[int]) -> Floats:
    """Token by token, in Python."""
    changed = logits.copy()
    counts, biases = Counter(written), dict(options.logit_bias)
    for token in range(VOCAB):
        value = np.float32(changed[token] + np.float32(biases.get(token, 0.0)))
        if token in prompt or token in written:
            penalty = np.float32(options.repetition_penalty)
            value = value * penalty if value < 0 else value / penalty
        taken_off = options.frequency_penalty * counts[token] + options.presence_penalty * (counts[token] > 0)
        changed[token] = value - np.float32(taken_off)
        if len(written) < options.min_tokens and token in options.stop_token_ids:
            changed[token] = -np.inf
    return changed


@settings(max_examples=300, deadline=None)
@given(LOGITS, OPTIONS, TOKENS, TOKENS)
def test_logits_change_as_the_definitions_say(
    logits: Floats, options: GenerateOptions, prompt: list[int], written: list[int]
) -> None:
    kept = logits.copy()
    changed = penalised(logits, options, before(prompt, written) if options.looks_back else None)
    np.testing.assert_array_equal(changed, by_definition(logits, options, prompt, written))
    np.testing.assert_array_equal(logits, kept, "the logits are the target's own, and stay so")


def test_without_options_not_even_a_copy_is_made() -> None:
    logits = np.zeros(VOCAB, np.float32)
    assert penalised(logits, GenerateOptions(temperature=0.8, top_p=0.9, min_p=0.1), None) is logits


def test_what_transformers_processors_make_of_logits() -> None:
    """Bias, repetition, temperature, top-k, top-p and min-p, in the order in which transformers applies them."""
    torch = pytest.importorskip("torch", reason="transformers: pip install '.[export]'")
    transformers = pytest.importorskip("transformers")
    random = np.random.default_rng(1)
    for _ in range(200):
        logits = (random.standard_normal(VOCAB) * 4).astype(np.float32)
        tokens = random.integers(0, VOCAB, 12).tolist()
        options = GenerateOptions(
            temperature=random.choice([0.5, 1.0, 1.7]),
            top_k=int(random.choice([0, 4, 12])),
            top_p=random.choice([1.0, 0.7, 0.95]),
            min_p=random.choice([0.0, 0.03, 0.3]),
            repetition_penalty=random.choice([1.0, 0.8, 1.3]),
            logit_bias=((5, 3.0), (8, -4.0)),
        )
        bias = {(token,): value for token, value in options.logit_bias}
        steps = [
            transformers.SequenceBiasLogitsProcessor(bias),
            transformers.RepetitionPenaltyLogitsProcessor(options.repetition_penalty),
            transformers.TemperatureLogitsWarper(float(options.temperature)),
            *([transformers.TopKLogitsWarper(options.top_k)] if options.top_k else []),
            *([transformers.TopPLogitsWarper(float(options.top_p))] if options.top_p < 1 else []),
            *([transformers.MinPLogitsWarper(float(options.min_p))] if options.min_p else []),
        ]
        scores = transformers.LogitsProcessorList(steps)(torch.tensor([tokens]), torch.tensor(logits[None]))
        expected = torch.softmax(scores[0].double(), -1).numpy()
        found = penalised(logits, options, before(tokens[:7], tokens[7:]) if options.looks_back else None)
        np.testing.assert_allclose(next_token_distribution(found, options), expected, rtol=1e-5, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(LOGITS, OPTIONS, TOKENS, TOKENS)
def test_a_draft_knows_all_but_what_repetition_needs_of_all_logits(
    logits: Floats, options: GenerateOptions, prompt: list[int], written: list[int]
) -> None:
    """Where the draft's log-probabilities are the logits themselves, they become what these become."""
    tokens = np.stack([np.argsort(-logits)[:8], np.argsort(logits)[:8]])
    known = [before(prompt, part) if options.looks_back else None for part in (written, written[:3])]
    expected = [penalised(logits, options, each)[row] for row, each in zip(tokens, known, strict=True)]
    np.testing.assert_array_equal(penalised_drafts(tokens, logits[tokens], options, known), expected)


def chain(*tokens: int) -> Tree:
    tree = Tree()
    for id, token in enumerate(tokens):
        tree.add(Row(id, id - 1 if id else NO_PARENT, token))
    return tree


def test_paths_are_the_text_and_what_hangs_below_it() -> None:
    tree = chain(5, 6, 7)
    paths = TextPaths(tree, [5, 6], num_written=1, num_left=4)
    tree.add(Row(3, 2, 8))
    tree.add(Row(4, 2, 9))
    tree.add(Row(5, 4, 10))
    first = paths.to([1], root=1)
    paths.append(7)
    later = paths.to([2, 3, 5], root=2)
    assert (first.text.tolist(), first.below, first.num_prompt) == ([5], ((6,),), 1)
    assert (later.text.tolist(), later.below) == ([5, 6], ((7,), (7, 8), (7, 9, 10)))
    assert later.before(2).tokens.tolist() == [5, 6, 7, 9, 10]
    assert later.before(2).written.tolist() == [6, 7, 9, 10]


def test_each_row_has_the_penalties_of_its_own_path() -> None:
    """After two tokens on one path the second is the third likeliest, and after the other path the first."""
    logits = np.zeros((3, VOCAB), np.float32)
    logits[:, 4:7] = [3.0, 2.9, 2.8]
    options = GenerateOptions(presence_penalty=1.0)
    rows = (Row(1, 0, 9), Row(2, 1, 4), Row(3, 2, 5))
    paths = Paths(1, np.array([9]), ((9,), (9, 4), (9, 4, 5)))
    job = ev.RunHead(1, rows, (1, 2, 3), np.zeros((3, 1), np.float32), options, paths)
    assert draw_tokens(job, logits, noise_of(VOCAB)).tokens == (4, 5, 6)


def test_drafts_are_ranked_by_what_their_own_paths_leave_likely() -> None:
    options = GenerateOptions(frequency_penalty=1.0, logit_bias=((6, 0.2),))
    rows = (Row(7, 3, 4), Row(8, 3, 5))
    paths = Paths(0, np.array([1]), ((4,), (5,)))
    job = ev.RunDraft(1, rows, np.array([3, 3]), np.zeros((0, 0), np.float32), (), options, paths)
    tokens = np.array([[4, 5, 6], [4, 5, 6]])
    drafts = ev.DraftFinished(tokens, np.log(np.array([[0.35, 0.33, 0.31]] * 2, np.float32)))
    ranked = rank_drafts(job, drafts, noise_of(VOCAB))
    assert ranked.tokens.tolist() == [[6, 5, 4], [6, 4, 5]]
    assert (np.exp(ranked.log_probs).sum(axis=1) < 1).all()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"min_p": 1.5}, "min_p is 1.5; it must lie between 0 and 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must lie between 0.01 and 100"),
        ({"presence_penalty": float("nan")}, "presence_penalty is nan"),
        ({"frequency_penalty": 2.1}, "frequency_penalty is 2.1; it must lie between -2 and 2"),
        ({"logit_bias": ((5, 101.0),)}, "logit_bias.5 is 101.0; it must lie between -100 and 100"),
        ({"logit_bias": ((5, 1.0), (5, 2.0))}, "logit_bias names a token twice"),
        ({"stop_token_ids": tuple(range(1025))}, "stop_token_ids names 1025 tokens; it may name 1024"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"num_logprobs": 21}, "num_logprobs is 21; it must lie between 0 and 20"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(FieldError) as error:
        GenerateOptions(**options)  # type: ignore[arg-type]
    assert text in str(error.value)


@pytest.mark.parametrize("options", [{"logit_bias": ((30, 1.0),)}, {"stop_token_ids": (-1,)}])
def test_tokens_that_the_model_has_not_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(FieldError, match="lie between 0 and 29"):
        GenerateOptions(**options).check_vocabulary(VOCAB)  # type: ignore[arg-type]
