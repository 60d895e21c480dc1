"""Text streams out as early as it is certain, and stop strings never show."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flowspec_edge.bundle import DEMO_BUNDLE
from flowspec_edge.engine.tokenizer import TextStream, Tokenizer
from flowspec_edge.errors import BundleError

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


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer(path)
