"""Texts from elsewhere are escaped before anyone sees them."""

import logging
import sys

import pytest

from flowspec_edge.cli.main import _PlainFormatter
from flowspec_edge.errors import is_plain, plain_text

OBEYED = ["\x1b[2J", "\n", "\r", "\0", "\x7f", "\x9b31m", "\u202e", "\u2066", "\u200f", "\u061c", "\u2028", "\ud800"]


@pytest.mark.parametrize("text", OBEYED, ids=ascii)
def test_what_a_terminal_obeys_is_escaped_and_readable(text: str) -> None:
    assert not is_plain(f"pi{text}")
    shown = plain_text(f"pi{text}-hall")
    assert is_plain(shown) and shown.startswith("pi\\") and shown.endswith("-hall")
    shown.encode()


def test_what_people_write_stays() -> None:
    for text in ("pi-küche", "台所", "🍓 pi", "a" * 5000, ""):
        assert plain_text(text) == text and is_plain(text)


def test_lines_of_this_machine_stay_lines() -> None:
    assert plain_text("first\n\tsecond\x1b", keeps_breaks=True) == "first\n\tsecond\\x1b"


def test_a_log_line_is_one_line_and_a_traceback_stands_apart() -> None:
    try:
        raise ValueError("x\x1b[2J\rflowspec: all is well\nflowspec: all is well")
    except ValueError:
        record = logging.LogRecord("n", 30, "f", 1, "peer %s", ("a\n\x1bb",), sys.exc_info())
    first, *rest = _PlainFormatter("flowspec: %(message)s").format(record).split("\n")
    assert first == "flowspec: peer a\\x0a\\x1bb"
    assert rest[0] == "  Traceback (most recent call last):"
    assert rest[-2:] == ["  ValueError: x\\x1b[2J\\x0dflowspec: all is well", "  flowspec: all is well"]
