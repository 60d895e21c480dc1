"""Whom a command looks for, and whom it has found so far: a line on standard error, where that is a terminal."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from flowspec_edge.errors import plain_text

if TYPE_CHECKING:
    from flowspec_edge.net.discovery import Announcement


class SearchDisplay:
    """One line that is rewritten, and is gone when the block of its ``with`` ends. Without a terminal, or where it
    ``is_quiet``, it shows nothing.
    """

    def __init__(self, cluster: str = "", *, is_quiet: bool, file: TextIO | None = None) -> None:
        self._file = file or sys.stderr
        self._what = f"looking for nodes of cluster {plain_text(cluster)}"
        self._is_shown = not is_quiet and self._file.isatty()

    def __enter__(self) -> Self:
        """Say at once what is waited for, before anything is loaded that it needs."""
        self.show(())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.clear()

    def show(self, found: Sequence[Announcement]) -> None:
        """Show that these were found so far."""
        names = f"{len(found)} found: {', '.join(node.node for node in found)}" if found else "none found yet"
        line = f"{self._what} ... {names}"
        width = shutil.get_terminal_size().columns - 1
        self._write(line if len(line) <= width else f"{line[: width - 4]} ...")

    def clear(self) -> None:
        """Take the line away, before others are printed."""
        self._write("")

    def _write(self, line: str) -> None:
        if self._is_shown:
            print(f"\r\033[K{line}", end="", file=self._file, flush=True)
