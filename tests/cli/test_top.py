"""What `flowspec top` makes of what a server tells."""

import asyncio
import dataclasses
import json
import sys

import pytest

from flowspec_edge.cli.show_top import BAR, Snapshot, bar, board_rows, print_plain, stage_rows
from flowspec_edge.client import Health
from flowspec_edge.net.server import serve_app
from flowspec_edge.web.app import build_app
from tests.narrowing import present
from tests.web.test_completions import PIECES, ScriptedGenerator
from tests.web.test_health import status_of


def told(busy_s: float, num_rows: int, num_bytes: int, reason: str = "") -> Health:
    work = {"num_chunks": 4, "num_rows": num_rows, "busy_s": busy_s, "waited_s": 0.02}
    return Health(
        not reason,
        reason,
        {
            "reason": reason,
            "model": "demo",
            "running": 1,
            "waiting": 2,
            "max_running": 16,
            "stages": [{"node": "pi\x1b", "address": "h:1", "start": 0, "stop": 4, "work": work}],
            "boards": [
                {
                    "node": "pi",
                    "address": "h:1",
                    "free_memory_bytes": 2**30,
                    "temperature_c": 61,
                    "watts": 7.46,
                    "state": "ready",
                }
            ],
            "link_bytes": {"sent": num_bytes, "received": 0},
        },
    )


def test_shares_are_of_the_time_between_two_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((10.0, 12.0, 14.0))
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    first = Snapshot.of(told(1.0, 10, 0))
    second = Snapshot.of(told(2.0, 30, 4000), first)
    monkeypatch.undo()
    assert (dict(first.busy), dict(second.busy), second.bytes_per_s) == ({}, {"pi\x1b": 0.5}, 2000)
    assert stage_rows(first) == [("pi\\x1b", "[0, 4)", "-", "-", "5.0 ms")]
    assert stage_rows(second) == [("pi\\x1b", "[0, 4)", "#####.....  50%", "10", "5.0 ms")]
    assert board_rows(second) == [("pi", "h:1", "1024 MiB", "61 C 7.5 W", "ready")]
    kept = dataclasses.replace(second, told={**second.told, "kept": {"num_sessions": 3, "num_bytes": 12 * 2**20}})
    assert kept.summary.endswith("2 waiting, 3 kept in 12 MiB, 2 kB/s on the origin's links")
    assert second.summary == "1 of 16 texts written, 2 waiting, 2 kB/s on the origin's links"


def test_a_new_ring_begins_anew() -> None:
    first = Snapshot.of(told(5.0, 10, 9000))
    assert dict(Snapshot.of(told(1.0, 1, 10), first).busy) == {}
    assert len(bar(1.0)) == len(bar(0.0)) == BAR


def test_without_a_terminal_it_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    print_plain(Snapshot.of(told(1.0, 10, 0, "layers have no home")), "http://pi")
    assert capsys.readouterr().out.splitlines() == [
        "demo at http://pi: 1 of 16 texts written, 2 waiting",
        "layers have no home",
        "STAGE   LAYERS  BUSY  ROWS/S  WAITED",
        "pi\\x1b  [0, 4)  -     -       5.0 ms",
        "BOARD  ADDRESS  FREE      HEAT        STATE",
        "pi     h:1      1024 MiB  61 C 7.5 W  ready",
    ]


@pytest.mark.slow
async def test_a_server_is_looked_at() -> None:
    served = await serve_app(build_app(ScriptedGenerator(PIECES), status=lambda: status_of(False, "no home")))
    try:
        for options in (["--json"], ["--every", "0.1"]):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "flowspec_edge", "top", "--url", f"127.0.0.1:{served.port}", *options),
                stdout=asyncio.subprocess.PIPE,
            )
            out, _ = await process.communicate()
            assert present(process.returncode) == 0
            if "--json" in options:
                assert json.loads(out)["reason"] == "no home"
            else:
                assert b"no home\nSTAGE" in out
    finally:
        await served.close()
