"""What commands print fits a terminal, and is left alone where there is none."""

from __future__ import annotations

import io
from typing import Any

import pytest

from flowspec_edge.bench.report import format_table
from flowspec_edge.cli.devices import READY, device_lines
from flowspec_edge.cli.layout import fitted, table_lines
from flowspec_edge.cli.show_search import SearchDisplay
from flowspec_edge.net.discovery import Announcement


def test_columns_are_as_narrow_as_their_cells() -> None:
    rows = [("pi5-attic-3f09a1", "800 MiB", "ready"), ("pi", "12000 MiB", "silent")]
    assert table_lines(("NODE", "FREE", "STATE"), rows, ("FREE",)) == [
        "NODE                   FREE  STATE",
        "pi5-attic-3f09a1    800 MiB  ready",
        "pi                12000 MiB  silent",
    ]
    assert table_lines(("NODE", "STATE"), []) == ["NODE  STATE"]


def test_what_boards_sense_has_a_column_where_any_does_and_fits_a_terminal() -> None:
    board: dict[str, Any] = {
        "node": "raspberrypi-4f21c9",
        "address": "192.168.100.120:7361",
        "version": "0.1.0",
        "state": READY,
    }
    board |= {"free_memory_bytes": 2**32, "temperature_c": None, "watts": None}
    assert device_lines([board])[0].split() == ["NODE", "ADDRESS", "VERSION", "FREE", "STATE"]
    lines = device_lines([board | {"temperature_c": 61, "watts": 7.46}, board | {"watts": 5.0}, board])
    cells = [line.partition("MiB")[2].split("  ") for line in lines[1:]]
    assert [[cell.strip() for cell in line if cell] for line in cells] == [
        ["61 C 7.5 W", "ready"],
        ["5.0 W", "ready"],
        ["-", "ready"],
    ]
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("width", [30, 46, 80])
def test_a_wide_table_becomes_several_with_the_first_column_each(width: int) -> None:
    header = ["schedule", *(f"set {number} (2)" for number in range(6))]
    lines = [[name, *(f"{number}.25 1.00x" for number in range(6))] for name in ("chunked", "flowspec")]
    table = format_table(header, lines)
    assert fitted(table, None) == table == fitted(table, 200)
    parts = fitted(f"tokens/s\n\n{table}\n\nbelow", width).split("\n\n")
    assert (parts[0], parts[-1]) == ("tokens/s", "below") and len(parts) > 3
    assert max(len(line) for part in parts for line in part.splitlines()) <= width
    cells = [[[cell.strip() for cell in row.split("|")[1:-1]] for row in part.splitlines()] for part in parts[1:-1]]
    assert all(part[2][0] == "chunked" and part[3][0] == "flowspec" for part in cells)
    assert [cell for part in cells for cell in part[0][1:]] == header[1:]
    assert [cell for part in cells for cell in part[3][1:]] == lines[1][1:]


def test_sentences_are_broken_between_words_and_go_on_indented() -> None:
    text = "short\n  why:  its machine is there, but drops what comes for port 7361"
    assert fitted(text, 40).splitlines() == [
        "short",
        "  why:  its machine is there, but drops",
        "    what comes for port 7361",
    ]
    assert fitted("x" * 100, 40) == "x" * 100, "a word is never cut"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def node(name: str) -> Announcement:
    return Announcement(node=name, host="10.0.0.1", port=7361, cluster="home", version="0.1.0")


def test_a_search_shows_one_line_on_a_terminal_and_takes_it_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    file = Terminal()
    with SearchDisplay("home", is_quiet=False, file=file) as display:
        assert file.getvalue() == "\r\033[Klooking for nodes of cluster home ... none found yet"
        display.show([node("pi-attic"), node("pi-hall")])
        assert file.getvalue().endswith("\033[Klooking for nodes of cluster home ... 2 found: pi-attic, pi-hall")
        display.show([node(f"pi-{number}") for number in range(40)])
        assert len(file.getvalue().rpartition("\033[K")[2]) <= 79 and file.getvalue().endswith(" ...")
    assert file.getvalue().endswith("\r\033[K")


@pytest.mark.parametrize(("file", "is_quiet"), [(io.StringIO(), False), (Terminal(), True)])
def test_a_search_shows_nothing_to_scripts(file: io.StringIO, is_quiet: bool) -> None:
    with SearchDisplay("home", is_quiet=is_quiet, file=file) as display:
        display.show([node("pi-attic")])
    assert file.getvalue() == ""
