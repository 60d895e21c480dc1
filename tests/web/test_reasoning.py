"""Reasoning and content come apart, however the text is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowspec_edge.web.reasoning import ReasoningSplit

PARTS = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "</", "think>", " ", "\n", "a", "b c", "<thin"]), max_size=12
)


def split(pieces: list[str], *, has_begun: bool = False) -> tuple[str, str]:
    splitter, reasoning, content = ReasoningSplit(has_begun=has_begun), "", ""
    for piece in pieces:
        said = splitter.feed(piece)
        reasoning, content = reasoning + said.reasoning, content + said.content
    said = splitter.feed("", is_last=True)
    return reasoning + said.reasoning, content + said.content


@pytest.mark.parametrize(
    ("text", "has_begun", "wanted"),
    [
        ("Hello.", False, ("", "Hello.")),
        (" Hello. ", False, ("", " Hello. ")),
        ("<think>\nhm\n\n</think>\n\nHello. ", False, ("hm", "Hello. ")),
        ("\n<think>hm</think>Hello.", False, ("hm", "Hello.")),
        ("hm\n</think>\n\nHello.", True, ("hm", "Hello.")),
        ("hm, and so on ", True, ("hm, and so on ", "")),
        ("<think>a </thin b</think>c", False, ("a </thin b", "c")),
        ("Say <think> and </think>", False, ("", "Say <think> and </think>")),
        ("<think></think>a", False, ("", "a")),
        ("<thin", False, ("", "<thin")),
        ("<think>a</thi", False, ("a</thi", "")),
    ],
)
def test_reasoning_is_split_off(text: str, has_begun: bool, wanted: tuple[str, str]) -> None:
    assert split([text], has_begun=has_begun) == wanted
    assert split(list(text), has_begun=has_begun) == wanted


@given(PARTS, st.booleans())
def test_the_cuts_do_not_matter(parts: list[str], has_begun: bool) -> None:
    whole = split(["".join(parts)], has_begun=has_begun)
    assert split(parts, has_begun=has_begun) == whole
    assert split(list("".join(parts)), has_begun=has_begun) == whole
