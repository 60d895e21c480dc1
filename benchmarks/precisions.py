"""What each precision costs: bytes per weight in files and in memory, what a text loses by it, and time.

    python -m benchmarks.precisions                      the demo model
    python -m benchmarks.precisions MODEL                a GGUF file or a checkpoint, as flowspec-export takes it
    python -m benchmarks.precisions --bundle DIR         a bundle that is there already, in all its precisions

Memory is what a process of its own has more after it has loaded all layers in that precision than before (``RssAnon``),
and beside it what plans reckon with. Times are of the processor, of one thread, for all layers behind 128 rows, so that
other programs on the machine do not count. A text's loss is in the manifest: of the layers in that precision and the
head in the bundle's own.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flowspec_edge.allocator import give_back_freed
from flowspec_edge.core.planning.placement import standby_memory_bytes
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.engine.timing import NUM_REPEATS, StageUnderTest
from flowspec_edge.manifest import Geometry, Manifest, load_manifest

PROJECT = Path(__file__).parents[1]
DEMO_MODEL = PROJECT / "exporter/demo_model/target"
PRECISIONS = ("w8a8", "fp32", "fp16", "int8", "q8", "int4")
"""The first one is that of the head."""
SIZES = (1, 4, 16)
_NO_LIMIT_S = 1e6


def num_layer_weights(geometry: Geometry) -> int:
    """The weights of all matrices in the layers."""
    width, inner = geometry.hidden_size, geometry.intermediate_size
    heads = (2 * geometry.num_heads + 2 * geometry.num_kv_heads) * geometry.head_dim
    return geometry.num_layers * width * (heads + 3 * inner)


def measure(directory: Path, precision: str) -> dict[str, Any]:
    """Load all layers in this process and time them.

    Returns:
        ``loaded_bytes``, and ``cpu_ms`` by chunk size.
    """
    manifest = load_manifest(directory)
    num_layers = manifest.geometry.num_layers
    StageRunner(
        directory, manifest, 0, 1, precision=precision
    ).close()  # what is loaded once comes with the first layer
    before = anonymous_bytes()
    runner = StageRunner(directory, manifest, 0, num_layers, precision=precision)
    loaded = anonymous_bytes() - before
    runner.close()
    stage = StageUnderTest(directory, manifest, 0, num_layers, 1, precision)
    times = {}
    for num_rows in SIZES:
        began = time.process_time()
        stage.time_ms(num_rows, _NO_LIMIT_S)
        times[num_rows] = (time.process_time() - began) * 1000 / (NUM_REPEATS + 1)
    return {"loaded_bytes": loaded, "cpu_ms": times}


def anonymous_bytes() -> int:
    """The memory of this process that is no file's."""
    gc.collect()
    give_back_freed()
    return status_bytes("RssAnon")


def status_bytes(name: str) -> int:
    """What Linux tells of this process under that name."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def rows_of(directory: Path, manifest: Manifest) -> Iterator[dict[str, Any]]:
    """What is told of each precision of a bundle."""
    num_weights = num_layer_weights(manifest.geometry)
    quality = {entry.precision: entry for entry in manifest.quality}
    for precision in manifest.precisions:
        blocks = manifest.blocks_of(0, manifest.geometry.num_layers, precision)
        command = [sys.executable, "-m", "benchmarks.precisions", "--measure", precision, "--bundle", str(directory)]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        entry = quality.get(precision)
        yield {
            "precision": precision,
            "file_bytes_per_weight": sum(block.num_bytes for block in blocks) / num_weights,
            "memory_bytes_per_weight": found["loaded_bytes"] / num_weights,
            "planned_bytes_per_weight": standby_memory_bytes(blocks) / num_weights,
            "perplexity": entry.perplexity if entry else None,
            "loss": entry.loss if entry else None,
            "same_token": entry.greedy_agreement if entry else None,
            "cpu_ms": found["cpu_ms"],
        }


def format_row(row: dict[str, Any]) -> str:
    """A line of a table in Markdown."""
    told = "- | -" if row["loss"] is None else f"{row['loss']:+.2%} | {row['same_token']:.1%}"
    times = " | ".join(f"{ms:.1f}" for ms in row["cpu_ms"].values())
    sizes = (row[f"{what}_bytes_per_weight"] for what in ("file", "memory", "planned"))
    return f"| `{row['precision']}` | {' | '.join(f'{size:.2f}' for size in sizes)} | {told} | {times} |"


HEADING = """\
| precision | file, bytes per weight | memory | planned | perplexity | same token | ms for 1 row | 4 rows | 16 rows |
|---|---:|---:|---:|---:|---:|---:|---:|---:|"""


def export(model: str, folder: Path) -> Path:
    """The bundle of a model in all precisions that it can have."""
    out = folder / "bundle"
    others = [*PRECISIONS[1:], *(["own"] if model.endswith(".gguf") else [])]
    command = [sys.executable, "-m", "exporter", model, "--precision", PRECISIONS[0], "--also", *others]
    subprocess.run([*command, "--max-loss", "1000", "--out", str(out)], check=True, cwd=PROJECT)
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.precisions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", default=str(DEMO_MODEL), metavar="MODEL")
    parser.add_argument("--bundle", type=Path, metavar="DIR")
    parser.add_argument("--measure", metavar="PRECISION", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measure(options.bundle, options.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        directory = options.bundle or export(options.model, Path(folder))
        manifest = load_manifest(directory)
        if not options.json:
            print(f"{manifest.name}, head in `{manifest.precision}`\n\n{HEADING}")
        for row in rows_of(directory.resolve(), manifest):
            print(json.dumps(row) if options.json else format_row(row), flush=True)


if __name__ == "__main__":
    main()
