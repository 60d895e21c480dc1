"""A device on which a row's bits depend on its chunk is found out, and takes a form in which they do not."""

from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from flowspec_edge.bundle import Bundle
from flowspec_edge.engine import row_check, stage_runner
from flowspec_edge.engine.graphs import CachedGraph
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.row_check import gives_rows_the_same_bits
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.manifest import Geometry
from tests.arm import row_bits
from tests.engine.conftest import NUM_LAYERS, Session, make_chain


class UnevenGraph(CachedGraph):
    """A row by itself has another last bit."""

    def run_bound(self, binding: ort.IOBinding) -> None:
        super().run_bound(binding)
        hidden_out = binding.get_outputs()[-1]
        rows = hidden_out.numpy()
        if rows.shape[1] == 1:
            hidden_out.update_inplace(np.nextafter(rows, np.float32(np.inf)))


@pytest.mark.parametrize(("kind", "expected"), [(CachedGraph, True), (UnevenGraph, False)])
def test_one_bit_of_one_row_is_noticed(bundle: Bundle, kind: type[CachedGraph], expected: bool) -> None:
    block = bundle.manifest.blocks[0]
    graph = kind(bundle.directory / block.file, block.start, block.stop, 1)
    assert gives_rows_the_same_bits(graph, 1, bundle.manifest.geometry, 1) is expected


def test_a_row_gets_one_of_padding_where_it_has_other_bits_by_itself(
    bundle: Bundle, whole: StageRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In any block: those of a file may have several forms, and of each form one is asked."""
    rows = make_chain([5, 6])
    session = Session(whole)
    expected = [session.run([row]) for row in rows]
    monkeypatch.setattr(stage_runner, "CachedGraph", UnevenGraph)
    session = Session(StageRunner(bundle.directory, bundle.manifest, 0, NUM_LAYERS))
    np.testing.assert_array_equal([session.run([row]) for row in rows], expected)
    first, *others = bundle.manifest.blocks
    last = replace(others.pop(), memory_bytes=first.memory_bytes + 1)
    asked = []

    def gives(block: CachedGraph, num_layers: int, geometry: Geometry, min_rows: int) -> bool:
        asked.append((block, min_rows))
        return len(asked) < 3

    for module in (stage_runner, row_check):
        monkeypatch.setattr(module, "gives_rows_the_same_bits", gives)
    stage = StageRunner(bundle.directory, replace(bundle.manifest, blocks=[first, *others, last]), 0, NUM_LAYERS)
    assert [min_rows for _, min_rows in asked] == [2, 1, 1]
    assert asked[-1][0] is stage.parts[last.sha256]
    assert "one by one" not in caplog.text


def test_more_threads_than_products_are_not_used(bundle: Bundle) -> None:
    """With eight of them, products with more than 128 slots would be cut for few rows, and not for many."""
    stage = StageRunner(bundle.directory, bundle.manifest, 0, NUM_LAYERS, num_threads=8)
    compared, differing = row_bits.compare(stage, bundle.manifest.geometry.vocab_size, seed=5, num_prompt=200)
    assert compared > 100 and not differing


@pytest.mark.parametrize("least", [2, 3])
def test_logits_of_one_row_are_padded_or_computed_row_by_row_where_chunks_change_them(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, least: int
) -> None:
    """Chunks of fewer rows than ``least``, padding counted, have other logits."""
    rows = np.random.default_rng(1).standard_normal((4, bundle.manifest.geometry.hidden_size), np.float32)
    expected = Head(bundle.directory, bundle.manifest).logits(rows)
    run = Head._run

    def uneven(self: Head, hidden: np.ndarray) -> Any:
        return run(self, hidden) + (max(len(hidden), self._min_rows) < least)

    monkeypatch.setattr(Head, "_run", uneven)
    head = Head(bundle.directory, bundle.manifest)
    found = np.concatenate([head.logits(row[None]) for row in rows])
    np.testing.assert_array_equal(head.logits(rows), found)
    is_row_by_row = least > 2
    np.testing.assert_array_equal(found, expected + is_row_by_row)
    assert ("rows run one by one" in caplog.text) is is_row_by_row
