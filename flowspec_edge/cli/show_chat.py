"""What a dialogue looks like: with colours at a terminal, plain elsewhere."""

from __future__ import annotations

import contextlib
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

from flowspec_edge.errors import StateError, plain_text
from flowspec_edge.files import state_directory, write_private
from flowspec_edge.tasks import interruptible

if TYPE_CHECKING:
    from flowspec_edge.client import Answer
    from flowspec_edge.config import Piece

MAX_HISTORY = 1000
"""Lines that are kept for the next time."""


class ChatDisplay:
    """Shows greetings, replies as they come, and what went wrong. ``is_plain`` leaves out all but the reply."""

    def __init__(self, *, is_plain: bool = False) -> None:
        from rich.console import Console

        self.is_terminal = sys.stdin.isatty() and sys.stdout.isatty() and not is_plain
        self._console = Console(highlight=False)
        self._errors = Console(stderr=True, highlight=False)
        self._is_thinking = False

    def greet(self, model: str, url: str) -> None:
        if self.is_terminal:
            self._print(f"{plain_text(model)} at {url}. /help lists commands; Ctrl-C interrupts a reply.", style="dim")

    def show(self, piece: Piece) -> None:
        """What has come of a reply. Nothing of it is obeyed by a terminal."""
        if piece.reasoning and self.is_terminal:
            self._is_thinking = True
            self._print(plain_text(piece.reasoning, keeps_breaks=True), style="dim italic", end="")
        if piece.text:
            if self._is_thinking:
                self._print("\n")
            self._is_thinking = False
            self._print(plain_text(piece.text, keeps_breaks=True), end="")
        self._console.file.flush()

    def end_reply(self, answer: Answer) -> None:
        self._is_thinking = False
        self._print("")
        if answer.statistics is not None and self.is_terminal:
            self._print(figures_line(answer), style="dim")

    def tell(self, text: str) -> None:
        """Of the program itself, not of the model."""
        if self.is_terminal:
            self._print(text, style="dim")
        else:
            self._errors.print(text, markup=False)

    def fail(self, text: str) -> None:
        self._errors.print(f"flowspec chat: {text}", style="red", markup=False)

    def _print(self, text: str, style: str = "", end: str = "\n") -> None:
        """A part of a line is wrapped by the terminal, which alone knows where it stands."""
        self._console.print(text, style=style, end=end, markup=False, soft_wrap=not end)


def figures_line(answer: Answer) -> str:
    """The figures of a reply in one line."""
    found, usage = answer.statistics or {}, answer.usage
    parts = [f"{usage.completion_tokens} tokens"] if usage is not None else []
    if found.get("tokens_per_s"):
        parts.append(f"{found['tokens_per_s']:.1f} tokens/s")
    if found.get("first_token_s") is not None:
        parts.append(f"first after {found['first_token_s']:.1f} s")
    if found.get("acceptance_length"):
        parts.append(f"acceptance length {found['acceptance_length']:.2f}")
    if found.get("joules_per_token") is not None:
        parts.append(f"{found['joules_per_token']:.3g} J per token")
    if answer.finish_reason == "length":
        parts.append("cut off by --max-new-tokens or the context")
    return ", ".join(parts)


class LineReader:
    """Lines that a user types, with those of before within reach of the arrow keys; or lines of standard input."""

    def __init__(self, *, keeps_history: bool) -> None:
        self._path = state_directory() / "chat-history" if keeps_history and sys.stdin.isatty() else None

    def __enter__(self) -> Self:
        if sys.stdin.isatty():
            import readline

            readline.set_history_length(MAX_HISTORY)
            with contextlib.suppress(OSError):
                if self._path is not None:
                    readline.read_history_file(self._path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._path is not None:
            import readline

            num = readline.get_current_history_length()
            lines = [readline.get_history_item(number) for number in range(max(num - MAX_HISTORY, 0) + 1, num + 1)]
            with contextlib.suppress(StateError):
                write_private(self._path, "".join(f"{line}\n" for line in lines))

    def read(self, display: ChatDisplay) -> str | None:
        """The next line; None where there is none. One that Ctrl-C gave up is empty."""
        try:
            with interruptible():
                return input("\n> " if display.is_terminal else "")
        except EOFError:
            if display.is_terminal:
                print()
            return None
        except KeyboardInterrupt:
            if not display.is_terminal:
                raise
            print("^C (Ctrl-D ends)")
            return ""
