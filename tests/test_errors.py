"""Texts from elsewhere are escaped before anyone sees them, and errors hold nothing but what they say."""

import gc
import logging
import sys
import weakref

import pytest

from flowspec_edge.cli.main import _PlainFormatter
from flowspec_edge.errors import FlowspecError, RingLostError, is_plain, plain_text, release_frames

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


class Keeper:
    """Has ended with an error, which everybody gets who asks."""

    def __init__(self) -> None:
        self.end = RingLostError("gone", lost=("pi",), cut=("pi", "hall"))
        self.end.__cause__ = OSError("no route")

    def ask(self) -> None:
        raise self.end.again()


def test_an_error_that_is_kept_is_raised_again_without_gathering_frames() -> None:
    keeper = Keeper()
    for _ in range(2):
        with pytest.raises(RingLostError, match="gone") as raised:
            keeper.ask()
        assert (raised.value.lost, raised.value.failed, raised.value.cut) == (("pi",), None, ("pi", "hall"))
        assert str(raised.value.__cause__) == "no route"
    assert keeper.end.__traceback__ is None
    del raised
    kept = weakref.ref(keeper)
    gc.disable()
    try:
        del keeper
        assert kept() is None
    finally:
        gc.enable()


def test_frames_are_released_of_an_error_and_of_all_behind_it() -> None:
    held: list[weakref.ref[Keeper]] = []

    def fail(cause: BaseException | None) -> None:
        keeper = Keeper()
        held.append(weakref.ref(keeper))
        raise FlowspecError("failed") from cause

    def caught(cause: BaseException | None) -> BaseException:
        try:
            fail(cause)
        except FlowspecError as error:
            return error
        raise AssertionError

    error = BaseExceptionGroup("all", [caught(caught(None)), caught(None)])
    error.exceptions[1].__context__ = error
    assert all(keeper() is not None for keeper in held)
    release_frames(error)
    assert len(held) == 3 and all(keeper() is None for keeper in held)
    assert error.exceptions[0].__traceback__ is not None, "where it was raised can still be told"
