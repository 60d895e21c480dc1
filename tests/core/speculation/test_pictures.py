"""Pictures of texts that are written on the real cores: at each step they are the tree, and looking changes nothing."""

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowspec_edge.config import GenerateOptions
from flowspec_edge.core.rows import NO_PARENT, Row
from flowspec_edge.core.speculation import pictures
from flowspec_edge.core.speculation.drafting import Drafting, DraftShape
from flowspec_edge.core.speculation.pictures import TextPicture
from flowspec_edge.core.speculation.tree import Tree
from tests.fakes import FakeRing

OPTIONS = GenerateOptions(max_new_tokens=24, label="mine", ignore_eos=True)
PROMPT = (3, 1, 4, 1, 5)


def drafted() -> Drafting:
    """Below the root 1 the rows 10 (0.6) and 11 (0.3), below 10 the rows 12 (0.3) and 13 (0.12); 11 has left."""
    drafting = Drafting(
        Tree([Row(0, NO_PARENT, 1), Row(1, 0, 2)]), DraftShape(width=4, proposals=3, children=2, rows_per_pass=10)
    )
    drafting.move_root(1, [2], 10)
    for parent, tokens, chances in ((1, [5, 6], [0.6, 0.3]), (10, [7, 8], [0.5, 0.2])):
        drafting.merge(
            [parent], np.array([tokens]), np.log(np.array([chances], np.float32)), parent + 9 if parent == 1 else 12
        )
    drafting.mark_sent([11])
    return drafting


def test_what_has_left_comes_first_and_then_what_is_likeliest() -> None:
    found = drafted().likeliest(3)
    assert found.ids == [11, 10, 12]
    assert (found.parents, found.tokens, found.positions) == ([1, 1, 10], [6, 5, 7], [2, 2, 3])
    assert found.is_sent == [True, False, False]
    assert found.chances == [0.3, 0.6, 0.3]


def test_nothing_is_drafted_before_there_is_a_root() -> None:
    assert Drafting(Tree(), DraftShape()).likeliest(9).ids == []


def run(seed: int, num_stages: int, schedule: str, look: Callable[[FakeRing], None]) -> tuple[list[int], int]:
    """The text that a ring writes, and in how many steps, where somebody looks after each."""
    ring = FakeRing(num_stages, random.Random(seed))
    options = GenerateOptions(max_new_tokens=24, schedule=schedule, label="mine", ignore_eos=True)
    answer, num_steps = ring.submit(1, PROMPT, options), 0
    while ring.step():
        num_steps += 1
        look(ring)
    return answer.tokens, num_steps


def check(picture: TextPicture) -> None:
    drafts, text = picture.drafts, [row.id for row in picture.text]
    assert len({len(column) for column in drafts}) == 1
    assert len(drafts.ids) == min(picture.num_drafts, pictures.MOST_DRAFTS)
    chances = dict(zip(drafts.ids, drafts.chances, strict=True)) | ({text[-1]: 1.0} if text else {})
    for id, parent, position, chance in zip(drafts.ids, drafts.parents, drafts.positions, drafts.chances, strict=True):
        assert chance <= chances[parent] + 1e-3 and id > parent, "a parent is there, and is as likely"
        assert position > picture.position
    for way in picture.ways:
        assert len(way.begins) == len(way.ends)
        if picture.num_read == picture.num_prompt and picture.num_drafts < pictures.MOST_DRAFTS:
            assert set(way.ids) <= set(drafts.ids) | set(text) | set(range(picture.num_prompt))


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4), st.sampled_from(["flowspec", "pruned", "autoregressive"]))
def test_pictures_are_the_tree_and_looking_changes_nothing(seed: int, num_stages: int, schedule: str) -> None:
    seen: list[TextPicture] = []
    looked = run(seed, num_stages, schedule, lambda ring: seen.extend(ring.origin.pictures()))
    assert looked == run(seed, num_stages, schedule, lambda ring: None)
    for picture in seen:
        check(picture)
    grown = {row.id: row.token for picture in seen for row in picture.text}
    written = [token for id, token in sorted(grown.items()) if id >= len(PROMPT)]
    assert written == looked[0][: len(written)] and len(written) >= len(looked[0]) - 1 - len(PROMPT)


@pytest.mark.parametrize("most", [1, 5])
def test_of_a_long_text_the_end_is_shown(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MOST_TEXT", most)
    ring = FakeRing(2, random.Random(1))
    answer = ring.submit(7, PROMPT, OPTIONS)
    while len(answer.tokens) < 9:
        assert ring.step()
    (picture,) = ring.origin.pictures()
    assert (picture.session, picture.label, picture.num_read, picture.num_prompt) == (7, "mine", 5, 5)
    assert [row.token for row in picture.text] == answer.tokens[-most:]
    assert picture.position == len(PROMPT) + len(answer.tokens) - 1
    assert picture.counts.num_tokens == len(answer.tokens)
    ring.run()
    assert ring.origin.pictures() == [], "a text that has ended is none that is written"
    assert picture.counts.num_tokens < len(answer.tokens), "a picture stays what it was"
