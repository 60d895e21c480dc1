"""What a board keeps in memory: of each layer, head and draft head beyond its file, and what plans reckon with.

    python -m benchmarks.memory                      the demo bundle
    python -m benchmarks.memory --bundle DIR         another one, in all its precisions
    python -m benchmarks.memory --operators          sessions of a few operators without weights

Each part is loaded in a process of its own, whose memory without files (``RssAnon``) is read before and after, and once
more when rows have gone through it. The same part was loaded and freed before: what is loaded once for all does not
count, nor do caches. Then it does its part for a prompt of NUM_TOKENS, and the most that the process had meanwhile
(``VmHWM``), caches included, stands beside what a plan reckons for sessions of that length.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.precisions import PROJECT, anonymous_bytes, status_bytes
from exporter.onnx_file import Writer, floats
from flowspec_edge.bundle import DEMO_BUNDLE
from flowspec_edge.core.events import RunDraft, RunForward
from flowspec_edge.core.limits import MAX_PREFILL_ROWS
from flowspec_edge.core.planning.placement import (
    RUNTIME_BYTES,
    ModelNeeds,
    origin_memory_bytes,
    standby_memory_bytes,
)
from flowspec_edge.core.planning.working_memory import HEAD_ROWS
from flowspec_edge.core.rows import NO_PARENT, Row
from flowspec_edge.core.speculation.kv_slots import KvSlots
from flowspec_edge.core.speculation.verify import NUM_KEPT_POSITIONS, noise_of
from flowspec_edge.engine.drafters.eagle3 import load_drafter
from flowspec_edge.engine.graphs import load_graph
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.manifest import load_manifest

NUM_ROWS, NUM_SHAPES, NUM_PROPOSALS, NUM_TOKENS = 128, 16, 10, 2048
NUM_OPERATORS, NUM_SESSIONS = (1, 21, 101), 8
SESSION = 1


@dataclass(frozen=True)
class Taken:
    """Bytes that something takes as soon as it is loaded, and after it was used, caches left out; and the most that it
    takes with a text.
    """

    loaded_bytes: int
    used_bytes: int
    text_bytes: int


def measure_layers(directory: Path, precision: str, num_threads: int) -> Taken:
    """All layers of a bundle, used for a chunk of NUM_ROWS rows, and for one of each smaller size up to NUM_SHAPES."""
    manifest = load_manifest(directory)
    stop = manifest.geometry.num_layers
    StageRunner(directory, manifest, 0, 1, precision=precision, num_threads=num_threads).close()
    before, before_all = anonymous_bytes(), status_bytes("VmRSS")
    runner = StageRunner(directory, manifest, 0, stop, precision=precision, num_threads=num_threads)
    loaded = anonymous_bytes()
    run_chain(runner, [NUM_ROWS, *range(1, NUM_SHAPES + 1)])
    used = anonymous_bytes()
    forget_peak()
    run_chain(runner, [MAX_PREFILL_ROWS] * (NUM_TOKENS // MAX_PREFILL_ROWS))
    return Taken(loaded - before, used - before, status_bytes("VmHWM") - before_all)


def run_chain(runner: StageRunner, sizes: Sequence[int]) -> None:
    """Run a text through a stage in chunks of these sizes, and free what it took."""
    slots = KvSlots(sum(sizes))
    runner.open_cache(SESSION, slots.capacity)
    for size in sizes:
        rows = tuple(Row(id, id - 1 if id else NO_PARENT, 1) for id in range(len(slots), len(slots) + size))
        runner.run(RunForward(SESSION, rows, None, slots.place(rows)))
    runner.free_caches()


def forget_peak() -> None:
    """Have ``VmHWM`` begin anew, from what the process has now."""
    Path("/proc/self/clear_refs").write_text("5")


def measure_origin(directory: Path, num_threads: int) -> Taken:
    """Head and draft head, used for NUM_SHAPES rows and NUM_ROWS verified ones, and then for a whole text."""
    manifest = load_manifest(directory)
    hidden_size, vocab_size = manifest.geometry.hidden_size, manifest.geometry.vocab_size

    def load_and_use() -> Iterator[int]:
        head = Head(directory, manifest, num_threads=num_threads)
        drafter = None
        if manifest.drafter is not None:
            drafter = load_drafter(directory, manifest, head, k=NUM_PROPOSALS, num_threads=num_threads)

        def use(num_head_rows: int, num_pairs: int) -> None:
            head.logits(np.zeros((num_head_rows, hidden_size), np.float32))
            if drafter is not None and manifest.drafter is not None:
                drafter.open(SESSION, num_pairs)
                rows = tuple(Row(id, id - 1, 1) for id in range(1, num_pairs))
                hidden = np.zeros((len(rows), hidden_size * max(len(manifest.drafter.taps), 1)), np.float32)
                drafter.run(RunDraft(SESSION, rows, np.arange(len(rows), dtype=np.int64), hidden, ()))
                drafter.close_all()

        yield anonymous_bytes()
        use(NUM_SHAPES, NUM_ROWS)
        yield anonymous_bytes()
        forget_peak()
        noise = noise_of(vocab_size)
        for position in range(NUM_KEPT_POSITIONS):
            noise(0, position)
        use(HEAD_ROWS, NUM_TOKENS)
        yield status_bytes("VmHWM")

    list(load_and_use())
    before, before_all = anonymous_bytes(), status_bytes("VmRSS")
    loaded, used, most = load_and_use()
    return Taken(loaded - before, used - before, most - before_all)


def rows_of(directory: Path, num_threads: int) -> Iterator[dict[str, Any]]:
    """What is told of a bundle: of its layers in each precision, and of what the origin has."""
    manifest = load_manifest(directory)
    num_layers = manifest.geometry.num_layers
    needs = ModelNeeds.from_manifest(manifest, num_tokens=NUM_TOKENS, head_ms=0.0)
    for precision in manifest.precisions:
        blocks = manifest.blocks_of(0, num_layers, precision)
        found = _in_a_process(directory, precision, num_threads)
        file_bytes = sum(block.num_bytes for block in blocks)
        row = _row(f"a layer, `{precision}`", num_layers, file_bytes, found, standby_memory_bytes(blocks))
        yield {**row, "planned_text_bytes": needs.memory_bytes(precision, len(needs.blocks)) - RUNTIME_BYTES}
    files = sum(file.num_bytes for entry in manifest.origin_entries for file in entry.files())
    found = _in_a_process(directory, "", num_threads)
    name = "head" if manifest.drafter is None else "head and draft head"
    row = _row(f"{name}, `{manifest.precision}`", 1, files, found, origin_memory_bytes(manifest))
    yield {**row, "planned_text_bytes": needs.origin_bytes}


def _row(part: str, number: int, file_bytes: int, taken: Taken, planned_bytes: int) -> dict[str, Any]:
    return {
        "part": part,
        "file_bytes": file_bytes // number,
        "loaded_bytes": taken.loaded_bytes // number,
        "used_bytes": taken.used_bytes // number,
        "planned_bytes": planned_bytes // number,
        "text_bytes": taken.text_bytes,
    }


def _in_a_process(directory: Path, precision: str, num_threads: int) -> Taken:
    """What the layers in a precision take, or head and draft head where it is empty."""
    command = [sys.executable, "-m", "benchmarks.memory", "--bundle", str(directory), "--threads", str(num_threads)]
    done = subprocess.run([*command, "--measure", precision], cwd=PROJECT, capture_output=True, text=True, check=True)
    return Taken(**json.loads(done.stdout))


def session_bytes(num_operators: int, num_threads: int) -> int:
    """What a session takes that subtracts its one input from itself again and again."""
    to, rows = Writer(), "rows"
    for number in range(num_operators):
        rows = to.add("Sub", rows, "rows", outputs=("difference",) if number == num_operators - 1 else ())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "operators.onnx"
        to.save(path, [floats("rows", 1, "n", 64)], [floats("difference", 1, "n", 64)])
        sessions = [load_graph(path, num_threads)]
        before = anonymous_bytes()
        sessions += [load_graph(path, num_threads) for _ in range(NUM_SESSIONS)]
        return (anonymous_bytes() - before) // NUM_SESSIONS


def format_row(row: dict[str, Any]) -> str:
    """A line of a table in Markdown, in MB; of a text what all layers take."""
    beyond = [row[what] - row["file_bytes"] for what in ("loaded_bytes", "used_bytes")]
    sizes = [row["file_bytes"], row["loaded_bytes"], *beyond, row["planned_bytes"]]
    sizes += [row["text_bytes"], row["planned_text_bytes"]]
    return f"| {row['part']} | {' | '.join(f'{size / 1e6:.2f}' for size in sizes)} |"


HEADING = """\
| MB | file | loaded | beyond the file | used, beyond the file | planned | with a text, all layers | planned |
|---|---:|---:|---:|---:|---:|---:|---:|"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, default=DEMO_BUNDLE, metavar="DIR")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--operators", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", metavar="PRECISION", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    directory: Path = options.bundle.resolve()
    if options.operators:
        for number in NUM_OPERATORS:
            print(f"a session of {number} operators: {session_bytes(number, options.threads) / 1e3:.0f} KB")
    elif options.measure is not None:
        if options.measure:
            taken = measure_layers(directory, options.measure, options.threads)
        else:
            taken = measure_origin(directory, options.threads)
        print(json.dumps(asdict(taken)))
    else:
        if not options.json:
            print(f"{load_manifest(directory).name}, {options.threads} threads\n\n{HEADING}")
        for row in rows_of(directory, options.threads):
            print(json.dumps(row) if options.json else format_row(row), flush=True)


if __name__ == "__main__":
    main()
