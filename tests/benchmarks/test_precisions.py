"""What the table of precisions tells of a bundle."""

import dataclasses

from benchmarks.precisions import HEADING, SIZES, format_row, num_layer_weights, rows_of
from flowspec_edge.bundle import DEMO_BUNDLE
from flowspec_edge.manifest import load_manifest


def test_a_row_tells_of_files_memory_and_time() -> None:
    manifest = load_manifest(DEMO_BUNDLE)
    (row,) = rows_of(DEMO_BUNDLE, manifest)
    assert row["precision"] == "int8" and row["loss"] == manifest.quality[0].loss
    assert 1.0 < row["file_bytes_per_weight"] < 1.2
    assert 4.0 < row["memory_bytes_per_weight"] < 6.0 and 4.0 < row["planned_bytes_per_weight"] < 6.0
    assert [int(size) for size in row["cpu_ms"]] == list(SIZES) and min(row["cpu_ms"].values()) > 0
    columns = [line.count("|") for line in (*HEADING.splitlines(), format_row(row))]
    assert len(set(columns)) == 1
    assert format_row({**row, "loss": None}).count("|") == columns[0], "what was not measured leaves its place empty"


def test_weights_of_layers_are_counted() -> None:
    geometry = load_manifest(DEMO_BUNDLE).geometry
    one = num_layer_weights(dataclasses.replace(geometry, num_layers=1))
    assert one == 256 * (4 * 64) * 2 + 256 * (2 * 64) * 2 + 3 * 256 * 704
    assert num_layer_weights(geometry) == 8 * one
