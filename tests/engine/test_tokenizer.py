"""Texts become tokens, unless they are too long; a file that is no tokenizer is named."""

import json
import threading
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flowspec_edge.bundle import DEMO_BUNDLE
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.errors import BundleError, RequestError

TOKENIZER = Tokenizer(DEMO_BUNDLE / "tokenizer.json")

WORDS = ["def ", "self", ".", "\n    ", "é", "✓", "#" * 32, "<|endoftext|>", "<|pad|>"]


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer(path)


LIMIT = 64
BOUNDED = Tokenizer(DEMO_BUNDLE / "tokenizer.json", LIMIT)
LONGEST = max(json.loads((DEMO_BUNDLE / "tokenizer.json").read_text())["model"]["vocab"], key=len)


@settings(max_examples=300, deadline=None)
@example(LONGEST * LIMIT)
@example("#" * len(LONGEST) * LIMIT)
@example("\n" + " " * 5000)
@given(st.one_of(st.text(max_size=200), st.text("# \n", max_size=3000), st.lists(st.sampled_from(WORDS)).map("".join)))
def test_no_text_that_fits_is_refused(text: str) -> None:
    tokens = TOKENIZER.encode(text)
    if len(tokens) <= LIMIT:
        assert BOUNDED.encode(text) == tokens


def test_a_text_that_cannot_fit_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    bounded = Tokenizer(DEMO_BUNDLE / "tokenizer.json", LIMIT)
    monkeypatch.setattr(bounded, "_tokenizer", None)
    with pytest.raises(RequestError, match=f"has 4194304 bytes; at most {LIMIT * len(LONGEST)} can be 64 tokens"):
        bounded.encode("a" * 2**22)


def test_half_of_a_character_is_refused() -> None:
    with pytest.raises(RequestError, match="UTF-8"):
        TOKENIZER.encode("x\ud800")


def test_a_long_text_is_tokenised_beside_other_threads() -> None:
    """Other threads, such as that of the event loop, would stand still for all of it."""
    turns, has_begun, is_done = [0.0], threading.Event(), threading.Event()

    def encode() -> None:
        has_begun.set()
        TOKENIZER.encode("The quick brown fox.\n" * 10_000)
        is_done.set()

    thread = threading.Thread(target=encode)
    began = time.perf_counter()
    thread.start()
    has_begun.wait()
    while not is_done.wait(0.001):
        turns.append(time.perf_counter() - began)
    thread.join()
    assert len(turns) > 10
