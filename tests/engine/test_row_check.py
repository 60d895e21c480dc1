"""A device on which a row's bits depend on its chunk is found out, and takes a form in which they do not."""

from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest

from flowspec_edge.bundle import Bundle
from flowspec_edge.core.rows import Floats
from flowspec_edge.engine import row_check, stage_runner
from flowspec_edge.engine.graphs import CachedGraph, pad_rows
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.padding import padded
from flowspec_edge.engine.row_check import gives_rows_the_same_bits, row_multiple
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.manifest import Geometry
from tests.arm import row_bits
from tests.engine.conftest import NUM_LAYERS, Session, make_chain

TILES = [(1, 1), (2, 2), (4, 4), (3, 0)]
"""How many rows a device takes at once, and of which number its chunks must have a multiple; 0 where of none."""


def turn_bits_of_rest(rows: np.ndarray, tile: int) -> np.ndarray:
    """Rows [..., rows, width] as a device has them that takes ``tile`` rows at once, and others for what is left."""
    rest = rows.shape[-2] // tile * tile
    return np.concatenate([rows[..., :rest, :], np.nextafter(rows[..., rest:, :], np.float32(np.inf))], axis=-2)


def graph_that_takes(tile: int) -> type[CachedGraph]:
    class TiledGraph(CachedGraph):
        def run_bound(self, binding: ort.IOBinding) -> None:
            super().run_bound(binding)
            hidden_out = binding.get_outputs()[-1]
            hidden_out.update_inplace(turn_bits_of_rest(hidden_out.numpy(), tile))

    return TiledGraph


@pytest.mark.parametrize(("tile", "expected"), TILES)
def test_the_multiple_is_found_of_which_rows_have_the_same_bits(bundle: Bundle, tile: int, expected: int) -> None:
    (block, *_), geometry = bundle.manifest.blocks, bundle.manifest.geometry
    graph = graph_that_takes(tile)(bundle.directory / block.file, block.start, block.stop, 1)
    assert row_multiple(graph, 1, geometry) == expected
    assert gives_rows_the_same_bits(graph, 1, geometry, 1) is (expected == 1)


@pytest.mark.parametrize("tile", [2, 4])
def test_chunks_are_padded_to_that_multiple(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tile: int
) -> None:
    rows = make_chain([5, 6, 7, 8, 9, 10, 11])
    monkeypatch.setattr(stage_runner, "CachedGraph", graph_that_takes(tile))
    stage = StageRunner(bundle.directory, bundle.manifest, 0, NUM_LAYERS)
    together, session = Session(stage).run(rows), Session(stage)
    apart = [session.run(rows[:1]), session.run(rows[1:4]), session.run(rows[4:])]
    np.testing.assert_array_equal(np.concatenate(apart), together)
    assert "one by one" not in caplog.text


def test_of_blocks_in_several_forms_one_of_each_is_asked(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = bundle.manifest.blocks
    last = replace(others.pop(), memory_bytes=first.memory_bytes + 1)
    asked: list[tuple[CachedGraph, int]] = []

    def gives(block: CachedGraph, num_layers: int, geometry: Geometry, multiple: int) -> bool:
        asked.append((block, multiple))
        return len(asked) != 2

    monkeypatch.setattr(row_check, "gives_rows_the_same_bits", gives)
    stage = StageRunner(bundle.directory, replace(bundle.manifest, blocks=[first, *others, last]), 0, NUM_LAYERS)
    files = stage.parts[first.sha256], stage.parts[last.sha256]
    assert asked == [(files[0], 1), (files[1], 1), (files[1], 2)]


def test_more_threads_than_products_are_not_used(bundle: Bundle) -> None:
    """With eight of them, products with more than 128 slots would be cut for few rows, and not for many."""
    stage = StageRunner(bundle.directory, bundle.manifest, 0, NUM_LAYERS, num_threads=8)
    compared, differing = row_bits.compare(stage, bundle.manifest.geometry.vocab_size, seed=5, num_prompt=200)
    assert compared > 100 and not differing


@pytest.mark.parametrize(("tile", "multiple"), TILES[1:])
def test_rows_of_a_head_are_padded_to_such_a_multiple_or_run_row_by_row(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tile: int, multiple: int
) -> None:
    rows = np.random.default_rng(1).standard_normal((7, bundle.manifest.geometry.hidden_size), np.float32)
    run = Head._run

    def run_tiled(head: Head, hidden: Floats) -> Floats:
        num_rows = padded(len(hidden), head._row_multiple)
        return turn_bits_of_rest(pad_rows(run(head, hidden), num_rows)[0], tile)[: len(hidden)]

    monkeypatch.setattr(Head, "_run", run_tiled)
    head = Head(bundle.directory, bundle.manifest)
    apart = [head.logits(rows[:1]), head.logits(rows[1:4]), head.logits(rows[4:])]
    np.testing.assert_array_equal(np.concatenate(apart), head.logits(rows))
    assert ("rows run one by one" in caplog.text) is (multiple == 0)
