"""Which sessions are kept, and which one a prompt takes over."""

import numpy as np
import pytest

from flowspec_edge.core.limits import MAX_KEPT_SESSIONS, SLOTS_PER_STEP
from flowspec_edge.core.speculation.kept_sessions import KEEP_S, MIN_ROWS, EndedText, KeptSessions, Reuse

TEXT = EndedText(tuple(range(100)), 90, tuple(np.zeros((3, 4), np.float32)))
PROMPT = (*TEXT.tokens, 7, 8)
AMPLE = 100 * SLOTS_PER_STEP
OF_TEXT = 2 * SLOTS_PER_STEP
"""Slots that it counts for."""


@pytest.fixture
def kept() -> KeptSessions:
    return KeptSessions(AMPLE)


def test_the_next_turn_takes_the_rows_that_it_begins_with(kept: KeptSessions) -> None:
    assert kept.keep(1, "", TEXT, 0.0) == []
    assert (len(kept), kept.num_slots) == (1, OF_TEXT)
    assert kept.take("", PROMPT, has_drafts=False) == Reuse(1, 99, TEXT)
    assert (len(kept), kept.num_slots) == (0, 0)
    assert kept.take("", PROMPT, has_drafts=False) is None, "it is taken over"


def test_with_drafts_it_takes_no_more_than_the_drafter_can_go_on_from(kept: KeptSessions) -> None:
    kept.keep(1, "", TEXT, 0.0)
    assert kept.take("", PROMPT, has_drafts=True) == Reuse(1, 93, TEXT)
    whole = EndedText(TEXT.tokens, 100)
    kept.keep(2, "", whole, 0.0)
    assert kept.take("", PROMPT, has_drafts=True) == Reuse(2, 99, whole)


@pytest.mark.parametrize("has_drafts", [False, True])
def test_the_last_row_of_the_prompt_is_computed(kept: KeptSessions, has_drafts: bool) -> None:
    kept.keep(1, "", TEXT, 0.0)
    assert kept.take("", TEXT.tokens[:80], has_drafts=has_drafts) == Reuse(1, 79, TEXT)


def test_a_text_is_not_cut_to_less_than_half(kept: KeptSessions) -> None:
    kept.keep(1, "", TEXT, 0.0)
    assert kept.take("", (*TEXT.tokens[:50], 200, 201), has_drafts=False) is None
    assert kept.take("", (*TEXT.tokens[:51], 200, 201), has_drafts=False) == Reuse(1, 50, TEXT)


def test_few_rows_are_not_worth_it(kept: KeptSessions) -> None:
    short = EndedText(TEXT.tokens[: MIN_ROWS + 1])
    assert kept.keep(1, "", EndedText(short.tokens[2:]), 0.0) == [1]
    kept.keep(2, "", short, 0.0)
    assert kept.take("", PROMPT[1:], has_drafts=False) is None
    assert kept.take("", PROMPT, has_drafts=False) == Reuse(2, MIN_ROWS, short)


def test_an_owners_sessions_serve_nobody_else(kept: KeptSessions) -> None:
    """Nor does it show that they are there: one that is the same is kept beside them."""
    kept.keep(1, "attic", TEXT, 0.0)
    assert kept.take("cellar", PROMPT, has_drafts=False) is None
    assert kept.take("", PROMPT, has_drafts=False) is None
    assert kept.keep(2, "cellar", TEXT, 0.0) == []
    assert kept.take("attic", PROMPT, has_drafts=False) == Reuse(1, 99, TEXT)
    assert kept.take("cellar", PROMPT, has_drafts=False) == Reuse(2, 99, TEXT)


def test_the_session_with_the_most_rows_is_taken(kept: KeptSessions) -> None:
    texts = {num: EndedText((*TEXT.tokens[:num], *range(300, 310))) for num in (40, 80, 60)}
    for num, text in texts.items():
        kept.keep(num, "", text, 0.0)
    assert kept.take("", PROMPT, has_drafts=False) == Reuse(80, 79, texts[80])
    assert kept.take("", PROMPT, has_drafts=False) == Reuse(60, 59, texts[60])
    assert len(kept) == 1


def test_a_text_stands_for_those_that_it_begins_with(kept: KeptSessions) -> None:
    kept.keep(1, "", EndedText(TEXT.tokens[:60]), 0.0)
    kept.keep(2, "", EndedText((*TEXT.tokens[:50], 300)), 0.0)
    assert kept.keep(3, "", TEXT, 0.0) == [1]
    assert kept.keep(4, "", TEXT, 0.0) == [3]
    assert len(kept) == 2


def test_the_oldest_make_room(kept: KeptSessions) -> None:
    kept = KeptSessions(3 * OF_TEXT)
    texts = [EndedText((number, *TEXT.tokens)) for number in range(5)]
    assert [kept.keep(number, str(number), texts[number], 0.0) for number in range(3)] == [[], [], []]
    large = EndedText((9,) * (3 * SLOTS_PER_STEP))
    assert kept.keep(3, "", large, 0.0) == [0, 1]
    assert kept.num_slots == 3 * OF_TEXT
    kept.check()
    assert kept.keep(4, "", EndedText((9,) * (5 * SLOTS_PER_STEP + 1)), 0.0) == [4], "it has no room at all"
    assert len(kept) == 2


def test_no_more_are_kept_than_stages_keep() -> None:
    kept = KeptSessions(1000 * OF_TEXT)
    for number in range(MAX_KEPT_SESSIONS):
        assert kept.keep(number, "", EndedText((number, *TEXT.tokens)), 0.0) == []
    assert kept.keep(99, "", TEXT, 0.0) == [0]
    kept.check()


def test_they_are_kept_for_a_while(kept: KeptSessions) -> None:
    assert kept.next_deadline() is None
    kept.keep(1, "", TEXT, 100.0)
    kept.keep(2, "", EndedText(TEXT.tokens[1:]), 101.0)
    assert kept.next_deadline() == 100.0 + KEEP_S
    assert kept.expire(99.0 + KEEP_S) == []
    assert kept.expire(100.0 + KEEP_S) == [1]
    assert kept.expire(102.0 + KEEP_S) == [2]
    assert kept.next_deadline() is None


def test_none_is_kept_where_there_is_no_room_for_any() -> None:
    kept = KeptSessions(0)
    assert not kept.is_on
    assert kept.keep(1, "", TEXT, 0.0) == [1]
