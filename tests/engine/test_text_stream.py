"""Text streams out as early as it is certain, and stop strings never show."""

import random
import time
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flowspec_edge.bundle import DEMO_BUNDLE
from flowspec_edge.engine.text_stream import TextStream
from flowspec_edge.engine.tokenizer import Tokenizer

TOKENIZER = Tokenizer(DEMO_BUNDLE / "tokenizer.json")


def stream(text: str, stop: tuple[str, ...] = ()) -> list[str]:
    """The pieces given token by token, and what finish adds."""
    out = TextStream(TOKENIZER, stop)
    return [out.feed((token,)) for token in TOKENIZER.encode(text)] + [out.finish()]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_the_pieces_make_the_text(text: str) -> None:
    assert "".join(stream(text)) == TOKENIZER.decode(TOKENIZER.encode(text))


def test_an_unfinished_character_waits_for_its_last_byte() -> None:
    pieces = stream("é✓")
    assert all("�" not in piece for piece in pieces)
    assert "".join(pieces) == "é✓"


@settings(max_examples=200, deadline=None)
@example("aba", ["b", "aba"])
@given(st.text("ab\n ", max_size=30), st.lists(st.text("ab\n", min_size=1, max_size=3), min_size=1, max_size=3))
def test_the_text_ends_before_the_first_stop_string(text: str, stop: Sequence[str]) -> None:
    cuts = [at for string in stop if (at := text.find(string)) >= 0]
    assert "".join(stream(text, tuple(stop))) == text[: min(cuts, default=len(text))]


@pytest.mark.parametrize(
    ("stop", "ended_by"), [((), None), (("c",), None), (("b", "ab"), "ab"), (("b", "cd"), "b"), (("ba", "bab"), "ba")]
)
def test_it_tells_which_stop_string_ended_it(stop: tuple[str, ...], ended_by: str | None) -> None:
    out = TextStream(TOKENIZER, stop)
    out.feed(tuple(TOKENIZER.encode("abab")))
    out.finish()
    assert (out.stop, out.is_stopped) == (ended_by, ended_by is not None)


@settings(max_examples=200, deadline=None)
@given(st.text("ab", max_size=60), st.lists(st.text("ab", min_size=1, max_size=9), min_size=1, max_size=3))
def test_all_is_given_that_cannot_become_a_stop_string(text: str, stop: Sequence[str]) -> None:
    out, given = TextStream(TOKENIZER, tuple(stop)), ""
    for num, letter in enumerate(text, 1):
        given += out.feed(tuple(TOKENIZER.encode(letter)))
        if out.is_stopped:
            return
        ends = [length for string in stop for length in range(len(string)) if text[:num].endswith(string[:length])]
        assert given == text[: num - max(ends)]


@pytest.mark.parametrize("stop", [(), ("ab" * 500, "b" * 500)])
def test_a_token_of_a_long_text_takes_as_long_as_the_first(stop: tuple[str, ...]) -> None:
    tokens = TOKENIZER.encode("".join(random.Random(1).choices("ab", k=40_000)))
    out = TextStream(TOKENIZER, stop)

    def best_s(part: Sequence[int]) -> float:
        times = []
        for start in range(0, len(part), 500):
            began = time.thread_time()
            out.take(tuple(part[start : start + 500]))
            times.append(time.thread_time() - began)
        return min(times)

    first = best_s(tokens[:2000])
    best_s(tokens[2000:-2000])
    assert best_s(tokens[-2000:]) < 3 * first + 0.001
