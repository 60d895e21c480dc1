"""A device on which a row's bits depend on its chunk is found out, and takes a form in which they do not."""

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from flowspec_edge.bundle import Bundle
from flowspec_edge.engine.graphs import CachedGraph
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.row_check import gives_rows_the_same_bits
from flowspec_edge.engine.stage_runner import StageRunner
from tests.arm import row_bits
from tests.engine.conftest import NUM_LAYERS


class UnevenGraph(CachedGraph):
    """A row by itself has another last bit."""

    def bind_step(self, binding: ort.IOBinding, inputs: dict[str, ort.OrtValue], hidden_out: ort.OrtValue) -> None:
        super().bind_step(binding, inputs, hidden_out)
        self.out = hidden_out

    def run_bound(self, binding: ort.IOBinding) -> None:
        super().run_bound(binding)
        rows = self.out.numpy()
        if rows.shape[1] == 1:
            self.out.update_inplace(np.nextafter(rows, np.float32(np.inf)))


@pytest.mark.parametrize(("kind", "expected"), [(CachedGraph, True), (UnevenGraph, False)])
def test_one_bit_of_one_row_is_noticed(bundle: Bundle, kind: type[CachedGraph], expected: bool) -> None:
    block = bundle.manifest.blocks[0]
    graph = kind(bundle.directory / block.file, block.start, block.stop, 1)
    assert gives_rows_the_same_bits(graph, 1, bundle.manifest.geometry, 1) is expected


def test_more_threads_than_products_are_not_used(bundle: Bundle) -> None:
    """With eight of them, products with more than 128 slots would be cut for few rows, and not for many."""
    stage = StageRunner(bundle.directory, bundle.manifest, 0, NUM_LAYERS, num_threads=8)
    compared, differing = row_bits.compare(stage, bundle.manifest.geometry.vocab_size, seed=5, num_prompt=200)
    assert compared > 100 and not differing


def test_logits_are_computed_row_by_row_where_chunks_change_them(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = np.random.default_rng(1).standard_normal((4, bundle.manifest.geometry.hidden_size), np.float32)
    expected = Head(bundle.directory, bundle.manifest).logits(rows)
    run = Head._run

    def uneven(self: Head, hidden: np.ndarray) -> Any:
        return run(self, hidden) if len(hidden) == 1 else run(self, hidden) + 1

    monkeypatch.setattr(Head, "_run", uneven)
    np.testing.assert_array_equal(Head(bundle.directory, bundle.manifest).logits(rows), expected)
    assert "rows run one by one" in caplog.text
