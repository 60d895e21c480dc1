"""Tables of columns, cells that several of them have, and texts that fit a terminal."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

GAP = "  "


def table_lines(columns: Sequence[str], rows: Sequence[Sequence[str]], to_right: Collection[str] = ()) -> list[str]:
    """A line for the names of the columns and one for each row, as narrow as can be. Columns ``to_right`` have their
    cells at the right edge.
    """
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    adjust = [str.rjust if column in to_right else str.ljust for column in columns]
    return [
        GAP.join(put(cell, width) for put, cell, width in zip(adjust, row, widths, strict=True)).rstrip()
        for row in (columns, *rows)
    ]


def heat_and_power(board: Mapping[str, Any]) -> str:
    """How hot a board is, and what it takes, as far as it tells."""
    heat, watts = board.get("temperature_c"), board.get("watts")
    parts = ([] if heat is None else [f"{heat} C"]) + ([] if watts is None else [f"{watts:.1f} W"])
    return " ".join(parts) or "-"


def terminal_width() -> int | None:
    """Characters of a line of standard output; None where it is no terminal, and lines may have any length."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def wrapped(line: str, width: int) -> str:
    """A sentence in lines of at most this ``width``, further ones indented; a word is never cut."""
    if len(line) <= width:
        return line
    indent = line[: len(line) - len(line.lstrip())] + GAP
    return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def fitted(text: str, width: int | None) -> str:
    """A text with Markdown tables in lines of at most this ``width``, where it is given: a wide table becomes several,
    each with the first column.
    """
    if width is None:
        return text
    parts: list[str] = []
    for is_table, group in groupby(text.split("\n"), lambda line: line.startswith("|")):
        lines = list(group)
        parts += _narrow_tables(lines, width) if is_table else (wrapped(line, width) for line in lines)
    return "\n".join(parts)


def _narrow_tables(lines: Sequence[str], width: int) -> Iterator[str]:
    """The lines of a Markdown table, or those of several that have its columns, with an empty line between them."""
    table = [line.strip("|").split("|") for line in lines]
    sizes = [len(cell) + 1 for cell in table[0]]
    first = 1
    while first < len(sizes):
        last = first + 1
        while last < len(sizes) and 1 + sizes[0] + sum(sizes[first : last + 1]) <= width:
            last += 1
        yield from (f"|{'|'.join([row[0], *row[first:last]])}|" for row in table)
        if last < len(sizes):
            yield ""
        first = last
