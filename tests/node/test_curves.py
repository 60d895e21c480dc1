"""Layer curves: measured once, kept by what they depend on, learned from forwards, and held against them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import pathlib
import time
import weakref
from collections.abc import Iterator

import pytest

from flowspec_edge.bundle import Bundle
from flowspec_edge.core.device.throttling import QUICK_FORWARDS, ThermalReport
from flowspec_edge.core.line import Line
from flowspec_edge.errors import StateError
from flowspec_edge.node import curves
from flowspec_edge.node.curves import LEARN_FORWARDS, TURN_NAME, Measurements
from flowspec_edge.weights.file_locks import is_locked
from tests.narrowing import present

LINE = Line(4.0, 0.5)
GIB = 2**30


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The precisions that were measured, each at once."""
    precisions: list[str] = []

    def measure(self: Measurements, bundle: Bundle, precision: str, free_bytes: int) -> Line:
        precisions.append(precision)
        return LINE

    monkeypatch.setattr(Measurements, "_measure", measure)
    return precisions


async def test_a_curve_is_measured_once_and_kept(bundle: Bundle, measured: list[str], state: pathlib.Path) -> None:
    measurements = Measurements(1)
    assert measurements.kept(bundle.manifest, "int8") is None
    assert await measurements.curve(bundle, "int8", GIB) == LINE
    assert await Measurements(1).curve(bundle, "int8", GIB) == LINE, "and by the next start"
    assert measured == ["int8"]
    (path,) = (state / "curves").iterdir()
    found = json.loads(path.read_text())
    assert (found["fixed_ms"], found["row_ms"], found["precision"], found["how"]) == (4.0, 0.5, "int8", "measured")


async def test_whoever_asks_while_it_is_measured_waits_for_that(bundle: Bundle, measured: list[str]) -> None:
    measurements = Measurements(1)
    found = await asyncio.gather(*(measurements.curve(bundle, "int8", GIB) for _ in range(3)))
    assert found == [LINE] * 3 and measured == ["int8"]


async def test_nodes_of_one_machine_take_turns_and_measure_once(
    bundle: Bundle, measured: list[str], state: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Measurements._measure

    def measure(self: Measurements, bundle: Bundle, precision: str, free_bytes: int) -> Line:
        assert is_locked(state / TURN_NAME)
        return real(self, bundle, precision, free_bytes)

    monkeypatch.setattr(Measurements, "_measure", measure)
    line = await Measurements(1).curve(bundle, "int8", GIB)
    assert len(measured) == 1 and not is_locked(state / TURN_NAME)

    @contextlib.contextmanager
    def other_had_the_turn(path: pathlib.Path, kind: int, *, waits: bool) -> Iterator[bool]:
        Measurements(2).keep(bundle.manifest, "int8", Line(7.0, 1.0), "measured")
        yield waits

    monkeypatch.setattr(curves, "locked", other_had_the_turn)
    assert await Measurements(2).curve(bundle, "int8", GIB) == Line(7.0, 1.0) != line
    assert len(measured) == 1


async def test_other_threads_precisions_and_shapes_have_curves_of_their_own(bundle: Bundle) -> None:
    manifest = bundle.manifest
    Measurements(1).keep(manifest, "int8", LINE, "measured")
    assert Measurements(1).kept(manifest, "int8") == LINE
    assert Measurements(2).kept(manifest, "int8") is None
    assert Measurements(1).kept(manifest, "int4") is None
    wider = dataclasses.replace(manifest, geometry=dataclasses.replace(manifest.geometry, intermediate_size=1))
    assert Measurements(1).kept(wider, "int8") is None
    deeper = dataclasses.replace(manifest, name="other", geometry=dataclasses.replace(manifest.geometry, num_layers=99))
    assert Measurements(1).kept(deeper, "int8") == LINE, "one layer of it takes the same"


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"fixed_ms": "soon", "row_ms": 1}', '{"fixed_ms": 1}', '{"fixed_ms": 0, "row_ms": 0}']
)
async def test_a_file_that_is_broken_is_as_good_as_none(bundle: Bundle, state: pathlib.Path, text: str) -> None:
    measurements = Measurements(1)
    measurements.keep(bundle.manifest, "int8", LINE, "measured")
    (path,) = (state / "curves").iterdir()
    path.write_text(text)
    assert measurements.kept(bundle.manifest, "int8") is None


async def test_a_full_disk_is_no_reason_to_stop(
    bundle: Bundle, measured: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: pathlib.Path, text: str) -> None:
        raise StateError(f"{path}: no space left")

    monkeypatch.setattr(curves, "write_private", refuse)
    assert await Measurements(1).curve(bundle, "int8", GIB) == LINE
    assert "a layer curve is not kept" in caplog.text


async def learned(bundle: Bundle, sizes: list[int]) -> Line | None:
    """What a stage of two layers that take LINE, and rests, leaves behind after forwards of these sizes."""
    measurements = Measurements(1)
    recorder = measurements.recorder(bundle.manifest, None, 2)
    recorder.rested_s = lambda: 0.5
    for size in sizes:
        recorder.add(size, 2 * LINE.at(size) / 1000 + 0.5)
    await recorder.finish()
    return measurements.kept(bundle.manifest, bundle.manifest.precision)


async def test_enough_forwards_of_several_sizes_make_a_curve_per_layer(bundle: Bundle) -> None:
    line = await learned(bundle, [1, 8] * (LEARN_FORWARDS // 2))
    assert line is not None
    assert (line.fixed, line.per_row) == pytest.approx((LINE.fixed, LINE.per_row), rel=0.05)


@pytest.mark.parametrize("sizes", [[1, 8] * (LEARN_FORWARDS // 2 - 1) + [1], [4] * 2 * LEARN_FORWARDS])
async def test_too_few_forwards_or_those_of_one_size_make_none(bundle: Bundle, sizes: list[int]) -> None:
    assert await learned(bundle, sizes) is None


async def test_a_stage_with_a_known_curve_learns_none_but_tells_how_far_it_is_from_it(bundle: Bundle) -> None:
    measurements = Measurements(1)
    measurements.keep(bundle.manifest, "int8", LINE, "measured")
    recorder = measurements.recorder(bundle.manifest, "int8", 2)
    assert recorder.line == LINE and await measurements.slowdown() == 1.0
    for ago in range(90, 0, -1):
        recorder.watch.observe(10.0, 19.0, time.monotonic() - ago)
    assert await measurements.slowdown() == pytest.approx(1.9)
    for size in [1, 8] * LEARN_FORWARDS:
        recorder.add(size, 99.0)
    await recorder.finish()
    assert measurements.kept(bundle.manifest, "int8") == LINE
    measurements.recorder(bundle.manifest, "int8", 2)
    assert await measurements.slowdown() == 1.0, "a stage that begins has no past"


@pytest.mark.parametrize("is_asked", [False, True], ids=["when the stage ends", "when a plan asks"])
async def test_a_curve_of_a_busy_board_is_corrected(bundle: Bundle, state: pathlib.Path, is_asked: bool) -> None:
    measurements = Measurements(1)
    measurements.keep(bundle.manifest, "int8", LINE.scaled(2.5), "measured")
    recorder = measurements.recorder(bundle.manifest, "int8", 2)
    for size in [1, 8] * QUICK_FORWARDS:
        recorder.add(size, 2 * LINE.at(size) / 1000)
    assert measurements.kept(bundle.manifest, "int8") == LINE.scaled(2.5)
    if is_asked:
        assert await measurements.slowdown() == 1.0
    else:
        await recorder.finish()
    line = present(measurements.kept(bundle.manifest, "int8"))
    assert (line.fixed, line.per_row) == pytest.approx((LINE.fixed, LINE.per_row))
    (path,) = (state / "curves").glob("*.json")
    assert json.loads(path.read_text())["how"] == "corrected"
    for size in [1, 8] * QUICK_FORWARDS:
        recorder.add(size, 2 * LINE.at(size) / 1000)
    await recorder.finish()
    assert measurements.kept(bundle.manifest, "int8") == line, "once is enough"


async def test_a_stage_that_has_ended_is_not_held(bundle: Bundle) -> None:
    class Stage:
        rested_s = 0.0

    measurements, stage = Measurements(1), Stage()
    held = weakref.ref(stage)
    recorder = measurements.recorder(bundle.manifest, "int8", 2)
    recorder.rested_s = functools.partial(getattr, stage, "rested_s")
    del stage
    assert held() is not None
    await recorder.finish()
    del recorder
    assert held() is None and await measurements.slowdown() == 1.0


async def test_a_forward_is_held_against_all_layers_of_its_stage(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    measurements = Measurements(1)
    measurements.keep(bundle.manifest, "int8", LINE, "measured")
    recorder = measurements.recorder(bundle.manifest, "int8", 2)
    seen: list[tuple[float, float]] = []
    monkeypatch.setattr(recorder.watch, "observe", lambda expected_ms, ran_ms, now: seen.append((expected_ms, ran_ms)))
    recorder.add(8, 0.025)
    assert seen == [(2 * LINE.at(8), 25.0)]


async def test_a_hot_board_says_so_before_its_forwards_do() -> None:
    assert await Measurements(1, lambda: None).slowdown() == 1.0
    assert await Measurements(1, lambda: ThermalReport(82.0, 80.0, 0.6)).slowdown() == pytest.approx(1 / 0.6)
