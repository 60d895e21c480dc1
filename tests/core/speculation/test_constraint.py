"""A toy grammar in the cores: what it allows is drawn, drafted and sent, and nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flowspec_edge.config import GenerateOptions, Grammar
from flowspec_edge.core import events as ev
from flowspec_edge.core.rows import NO_PARENT, Paths, Row
from flowspec_edge.core.speculation.constraint import prune_drafts
from flowspec_edge.core.speculation.verify import draw_tokens, noise_of, rank_drafts
from flowspec_edge.errors import FieldError, GrammarError
from tests.fakes import EOS, VOCAB, FakeRing, unsplit

GRAMMAR = Grammar("lark", "toy")
"""Words of one to five letters, each followed by the two tokens of a full stop, and the end after a full stop."""
STOP = (11, 12)
OPTIONS = GenerateOptions(max_new_tokens=60, temperature=1.0, seed=2, grammar=GRAMMAR)


class Words:
    """Allows tokens as ``GRAMMAR`` says. Letters stand in the order of their ids, none twice in a row."""

    ends = frozenset({EOS})

    def __init__(self, breaks_at: int | None = None) -> None:
        self.breaks_at = breaks_at

    def num_allowed(self, written: NDArray[np.int64], tokens: Sequence[int]) -> int:
        text = written.tolist()
        with contextlib.suppress(GrammarError):
            for at, token in enumerate(tokens):
                if token in self.ends or not self.allowed(np.array([*text, *tokens[:at]], np.int64))[token]:
                    return at
            return len(tokens)
        return 0

    def allowed(self, written: NDArray[np.int64]) -> NDArray[np.bool_]:
        if self.breaks_at is not None and len(written) >= self.breaks_at:
            raise GrammarError("the text became too complex")
        mask = np.zeros(VOCAB, np.bool_)
        text = written.tolist()
        word = text[len(text) - next((at for at, token in enumerate(reversed(text)) if token == STOP[1]), len(text)) :]
        if EOS in text:
            mask[EOS] = True
        elif word[-1:] == [STOP[0]]:
            mask[STOP[1]] = True
        elif len(word) == 5:
            mask[STOP[0]] = True
        else:
            mask[1:11] = True
            mask[word[-1:]] = False
            mask[STOP[0]] = bool(word)
            mask[EOS] = not word and bool(text)
        return mask


def is_allowed(text: list[int]) -> bool:
    return all(Words().allowed(np.array(text[:at], np.int64))[token] for at, token in enumerate(text))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.8, 1.5]),
    st.sampled_from(["flowspec", "chunked", "pipedec", "lockstep", "autoregressive"]),
    st.integers(1, 4),
    st.sampled_from([1.0, 1.3]),
    st.sampled_from([1.0, 0.8]),
)
def test_rings_write_what_the_model_writes_under_the_same_grammar(
    seed: int, temperature: float, schedule: str, num_stages: int, penalty: float, top_p: float
) -> None:
    rng = random.Random(seed)
    options = GenerateOptions(
        max_new_tokens=30,
        temperature=temperature,
        seed=seed,
        schedule=schedule,
        grammar=GRAMMAR,
        repetition_penalty=penalty,
        top_p=top_p,
    )
    prompt = tuple(rng.randrange(1, VOCAB) for _ in range(rng.randrange(1, 8)))
    expected = unsplit(prompt, options, constraint=Words())
    ring = FakeRing(num_stages, rng, constraint=Words())
    answer = ring.submit(1, prompt, options)
    ring.run()
    assert answer.tokens == expected and is_allowed(expected)
    assert answer.reason == ("stop" if expected[-1] == EOS else "length")
    for path in ring.sent_paths(1):
        assert is_allowed(path[len(prompt) :]), "a row was sent that the grammar forbids"


def test_a_text_goes_on_elsewhere_where_its_tokens_have_left_the_grammar() -> None:
    options = GenerateOptions(max_new_tokens=30, temperature=1.0, seed=5, grammar=GRAMMAR)
    prompt = (4, 5)
    expected = unsplit(prompt, options, constraint=Words())
    for num_written in (1, 7, len(expected) - 2):
        ring = FakeRing(2, random.Random(1), constraint=Words())
        left = GenerateOptions(max_new_tokens=30 - num_written, temperature=1.0, seed=5, grammar=GRAMMAR)
        answer = ring.submit(1, (*prompt, *expected[:num_written]), left, num_written)
        ring.run()
        assert answer.tokens == expected[num_written:]


def test_what_must_come_leaves_with_the_token_before_it_and_without_a_pass() -> None:
    ring = FakeRing(2, random.Random(3), skill=0.0, constraint=Words())
    ring.origin._has_drafter = False
    answer = ring.submit(1, (4, 5), GenerateOptions(max_new_tokens=60, temperature=1.0, seed=2, grammar=GRAMMAR))
    ring.run()
    num_stops = answer.tokens.count(STOP[1])
    num_verifications = sum(trip.num_accepted > 0 for trip in answer.trips)
    assert num_stops > 3 and num_verifications < len(answer.tokens) - num_stops / 3


class Turns(Words):
    """Allows two tokens at each place, others at the next one."""

    def allowed(self, written: NDArray[np.int64]) -> NDArray[np.bool_]:
        first = 1 + 2 * (len(written) % 5)
        return np.isin(np.arange(VOCAB), (first, first + 1))


def test_the_text_drafts_of_itself_what_its_grammar_allows() -> None:
    """Without a drafter, and where nothing is forced, it takes fewer trips, and no row is sent that may not come."""
    options, prompt = dataclasses.replace(OPTIONS, temperature=0.0), tuple(range(1, 11)) * 2
    expected = unsplit(prompt, options, constraint=Turns())
    num_trips = {}
    for schedule in ("flowspec", "flowspec-without-lookup"):
        ring = FakeRing(2, random.Random(3), constraint=Turns())
        ring.origin._has_drafter = False
        answer = ring.submit(1, prompt, dataclasses.replace(options, schedule=schedule))
        ring.run()
        assert answer.tokens == expected
        for path in ring.sent_paths(1):
            assert Turns().num_allowed(np.zeros(0, np.int64), path[len(prompt) :]) == max(len(path) - len(prompt), 0)
        num_trips[schedule] = sum(trip.num_accepted > 0 for trip in answer.trips)
    assert num_trips["flowspec"] < num_trips["flowspec-without-lookup"] == len(expected)


def test_a_grammar_that_becomes_too_complex_ends_its_own_text_alone() -> None:
    ring = FakeRing(2, random.Random(3), constraint=Words(breaks_at=9))
    broken = ring.submit(1, (4, 5), GenerateOptions(max_new_tokens=60, temperature=1.0, seed=2, grammar=GRAMMAR))
    other = ring.submit(2, (4, 5), GenerateOptions(max_new_tokens=20, seed=2))
    ring.run()
    assert (broken.reason, broken.error) == ("refused", "the text became too complex") and len(broken.tokens) < 10
    assert other.tokens == unsplit((4, 5), GenerateOptions(max_new_tokens=20, seed=2))


def test_a_row_is_drawn_by_what_its_own_path_allows() -> None:
    rows = (Row(1, 0, 3), Row(2, 1, STOP[0]))
    paths = Paths(1, np.array([9]), ((3,), (3, STOP[0])))
    options = GenerateOptions(grammar=GRAMMAR)
    job = ev.RunHead(1, rows, (1, 2), np.zeros((2, 1), np.float32), options, paths)
    logits = np.tile(np.arange(VOCAB, dtype=np.float32), (2, 1))
    drawn = draw_tokens(job, logits, noise_of(VOCAB), Words())
    assert drawn.tokens == (STOP[0], STOP[1]) and drawn.forced == ((STOP[1],), ())


@pytest.mark.parametrize("options", [None, GenerateOptions(grammar=GRAMMAR, temperature=1.0, min_p=0.1)])
def test_forbidden_drafts_come_last_and_a_single_allowed_token_comes_first(options: GenerateOptions | None) -> None:
    rows = (Row(7, 3, 4), Row(8, 3, STOP[0]), Row(9, NO_PARENT, 1))
    paths = Paths(0, np.array([1]), ((4,), (4, STOP[0]), (2, 3, 4, 5)))
    job = ev.RunDraft(1, rows, np.array([3, 3, 3]), np.zeros((0, 0), np.float32), (), options, paths, GRAMMAR)
    drafts = ev.DraftFinished(np.array([[EOS, 5, 4]] * 3), np.log(np.array([[0.6, 0.2, 0.1]] * 3, np.float32)))
    ranked = rank_drafts(job, drafts, noise_of(VOCAB), Words())
    assert ranked.tokens[:2, 0].tolist() == [5, STOP[1]] and ranked.tokens[2, 0] == STOP[0]
    assert np.isneginf(ranked.log_probs[:, 1:]).all() and np.isfinite(ranked.log_probs[:, 0]).all()


def test_what_is_allowed_shares_the_chances_of_what_is_not() -> None:
    paths = Paths(0, np.array([1]), ((4,),))
    drafts = ev.DraftFinished(np.array([[EOS, 5, 6]]), np.log(np.array([[0.5, 0.2, 0.1]], np.float32)))
    pruned = prune_drafts(drafts, [paths.before(0)], Words())
    np.testing.assert_allclose(np.exp(pruned.log_probs), [[0.0, 0.8 * 2 / 3, 0.8 / 3]], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"grammar": Grammar("bnf", "")}, "grammar is of kind 'bnf'; it must be one of json, regex, choice, lark"),
        ({"grammar": Grammar("regex", "a" * 65537)}, "grammar has 65537 characters; it may have 65536"),
        ({"grammar": GRAMMAR, "ignore_eos": True}, "ignore_eos is set beside a grammar"),
        ({"grammar": GRAMMAR, "min_tokens": 3}, "min_tokens is set beside a grammar"),
    ],
)
def test_options_that_no_grammar_can_have_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(FieldError) as error:
        GenerateOptions(**options)  # type: ignore[arg-type]
    assert text in str(error.value)
