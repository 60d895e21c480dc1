"""What canonical attention costs: the layers as they are beside the same layers with the fused operator, step for step.

    python -m benchmarks.attention_cost               layers of TinyLlama's shape in w8a8; the first run exports them
    python -m benchmarks.attention_cost --json

The fused operator is what drafters have; here whole layers get it, as no bundle does, and all else in them is the same
node for node. Both kinds take turns, so that other work on the machine slows both alike. A step is what a stage does
for a chunk of a draft tree: slots, inputs, binding, the run. A prompt is written in chunks of 128 rows into an empty
cache.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np

from flowspec_edge.core.events import RunForward
from flowspec_edge.core.limits import PREFILL_ROWS
from flowspec_edge.core.rows import NO_PARENT, Floats, Row
from flowspec_edge.core.speculation.draft_slots import DraftSlots
from flowspec_edge.core.speculation.kv_slots import KvSlots
from flowspec_edge.engine.drafters.fused_cache import FusedCache, StepInputs
from flowspec_edge.engine.graphs import CachedGraph, HiddenRows
from flowspec_edge.engine.padding import min_rows
from flowspec_edge.engine.rotary import RotaryTables
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.manifest import (
    FORMAT_VERSION,
    HIDDEN,
    HIDDEN_OUT,
    Geometry,
    Manifest,
    load_manifest,
)

PROJECT = Path(__file__).resolve().parents[1]
PRECISION = "w8a8"
SIZES, PASTS, NUM_PROMPT = (1, 4, 16), (128, 1024, 4096), 2000
NUM_TURNS, SPENT_S = 41, 3.0
SESSION = 1
CONFIG = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def export_both(folder: Path) -> Path:
    """A bundle of random weights, and beside its blocks the same ones with the fused operator, as ``*.fused.onnx``."""
    out = folder / f"attention-pair-v{FORMAT_VERSION}"
    if (out / "done").exists():
        return out
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from exporter.bundle import ExportOptions, export_bundle

    print("exporting random weights ...", file=sys.stderr, flush=True)
    source = folder / "attention.checkpoint"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**CONFIG)).half().save_pretrained(source)
    shutil.copy(PROJECT / "exporter/demo_model/target/tokenizer.json", source)
    manifest = export_bundle(ExportOptions(checkpoint=source, drafter=None, out=out, precision=PRECISION, force=True))
    for entry in manifest.blocks:
        fuse_attention(out / entry.file, fused_file(out, entry.file), entry.start, manifest.geometry)
    shutil.rmtree(source)
    (out / "done").touch()
    return out


def fuse_attention(source: Path, path: Path, layer: int, geometry: Geometry) -> None:
    """Write a block of one layer with the fused operator. All else is the same: its matrices, norms and their nodes."""
    import onnx
    from onnx import helper

    from exporter.fused_attention import fused_caches, fused_inputs, write_fused_attention
    from exporter.onnx_file import Writer, floats

    graph = (model := onnx.load(source)).graph
    kinds = [node.op_type for node in graph.node]
    first, stop = kinds.index("RotaryEmbedding"), kinds.index("Slice") + 1  # attention is one piece
    query, key = (node.input[0] for node in graph.node if node.op_type == "RotaryEmbedding")
    (whole,) = (a.g for a in graph.node[kinds.index("If")].attribute if a.name == "else_branch")  # see _rounded
    to = Writer(first_number=10_000)  # behind all names of the block
    attended = write_fused_attention(to, query, key, whole.node[0].input[0], layer, geometry)
    to.add("Identity", attended, outputs=(graph.node[stop - 1].output[0],))
    nodes = [*graph.node[:first], *to.nodes, *graph.node[stop:]]
    used = {name for node in nodes for name in node.input}
    weights = [tensor for tensor in graph.initializer if tensor.name in used]
    past, present = fused_caches(geometry, layer)
    inputs = [floats(HIDDEN, 1, "rows", geometry.hidden_size), *fused_inputs(geometry), *past]
    outputs = [floats(HIDDEN_OUT, 1, "rows", geometry.hidden_size), *present]
    model.graph.CopyFrom(helper.make_graph(nodes, "graph", inputs, outputs, [*weights, *to.constants]))
    onnx.save(model, path)


def fused_file(bundle: Path, file: str) -> Path:
    return (bundle / file).with_suffix(".fused.onnx")


class Stage(Protocol):
    """Layers with a cache."""

    def run(self, rows: Sequence[Row], hidden: Floats) -> None: ...

    def forget(self, rows: Sequence[Row]) -> None: ...


class CanonicalStage:
    def __init__(self, bundle: Path, manifest: Manifest, num_threads: int, capacity: int) -> None:
        self._runner = StageRunner(bundle, manifest, 0, manifest.geometry.num_layers, num_threads=num_threads)
        self._runner.open_cache(SESSION, capacity)
        self._slots = KvSlots(capacity)

    def run(self, rows: Sequence[Row], hidden: Floats) -> None:
        self._runner.run(RunForward(SESSION, tuple(rows), hidden, self._slots.place(rows)))

    def forget(self, rows: Sequence[Row]) -> None:
        self._slots.drop([row.id for row in rows])


class FusedStage:
    def __init__(self, bundle: Path, manifest: Manifest, num_threads: int, capacity: int) -> None:
        geometry = manifest.geometry
        self._min_rows = min_rows(manifest.precision)
        self._graphs = [
            CachedGraph(fused_file(bundle, block.file), block.start, block.stop, num_threads)
            for block in manifest.blocks
        ]
        self._slots = DraftSlots(capacity)
        self._step = StepInputs(self._min_rows)
        self._cache = FusedCache(geometry.num_layers, geometry.num_kv_heads, capacity, geometry.head_dim)
        tables = RotaryTables(geometry.ropes).reach(self._cache.num_slots)
        tables.fill(np.array([self._cache.num_slots - 1]))
        kept = {**tables.inputs, **self._step.numbers}
        self._bindings = [
            graph.bind(self._cache.values[2 * block.start : 2 * block.stop], kept)
            for graph, block in zip(self._graphs, manifest.blocks, strict=True)
        ]

    def run(self, rows: Sequence[Row], hidden: Floats) -> None:
        """Each row is at the position of its slot, or all are at that of the first where they are siblings."""
        mask = self._slots.mask_behind(rows)
        positions = mask.sum(axis=1) - 1
        inputs = self._step.set(mask, positions)
        on_the_way = HiddenRows(hidden, self._min_rows)
        for graph, binding in zip(self._graphs, self._bindings, strict=True):
            graph.bind_step(binding, {**inputs, HIDDEN: on_the_way.source}, on_the_way.target)
            graph.run_bound(binding)
            on_the_way.advance()
        self._slots.place(rows)

    def forget(self, rows: Sequence[Row]) -> None:
        self._slots.release([row.id for row in reversed(rows)])


class Turns:
    """Both kinds of a stage, with the same rows."""

    def __init__(self, bundle: Path, num_threads: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._manifest = load_manifest(bundle)
        self._hidden = np.random.default_rng(0).standard_normal(
            (PREFILL_ROWS, self._manifest.geometry.hidden_size), np.float32
        )
        arguments = bundle, self._manifest, num_threads, max(PASTS) + PREFILL_ROWS
        self.stages: dict[str, Stage] = {"canonical": CanonicalStage(*arguments), "fused": FusedStage(*arguments)}
        self._num_past = 0

    def grow(self, num_past: int) -> dict[str, float]:
        """Have that many rows in the caches. Returns what it took, in ms."""
        took = dict.fromkeys(self.stages, 0.0)
        while self._num_past < num_past:
            stop = min(self._num_past + PREFILL_ROWS, num_past)
            rows = [Row(id, id - 1 if id else NO_PARENT, 1) for id in range(self._num_past, stop)]
            for name, stage in self.stages.items():
                took[name] += self._ms(lambda: stage.run(rows, self._hidden[: len(rows)]))  # noqa: B023 - called here
            self._num_past = stop
        return took

    def steps(self, num_rows: int) -> dict[str, float]:
        """Medians of a chunk of ``num_rows`` siblings, in ms."""
        parent = self._num_past - 1
        rows = [Row(parent + 1 + number, parent, number) for number in range(num_rows)]
        times: dict[str, list[float]] = {name: [] for name in self.stages}
        until = time.monotonic() + SPENT_S
        while len(times["fused"]) < 5 or (len(times["fused"]) < NUM_TURNS and time.monotonic() < until):
            for name, stage in self.stages.items():
                times[name].append(self._ms(lambda: stage.run(rows, self._hidden[:num_rows])))  # noqa: B023 - called here
                stage.forget(rows)
        return {name: median(found) for name, found in times.items()}

    def _ms(self, run: Callable[[], None]) -> float:
        began = self._clock()
        run()
        return (self._clock() - began) * 1000


def measure(bundle: Path, num_threads: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def add(what: str, num_rows: int, found: dict[str, float]) -> None:
        ratio = found["canonical"] / found["fused"]
        rows.append({"threads": num_threads, "past": what, "n": num_rows, **found, "ratio": ratio})
        print(describe(rows[-1]), file=sys.stderr, flush=True)

    Turns(bundle, num_threads, clock).grow(PREFILL_ROWS)  # the first runs allocate
    add(f"prompt of {NUM_PROMPT}", PREFILL_ROWS, Turns(bundle, num_threads, clock).grow(NUM_PROMPT))
    turns = Turns(bundle, num_threads, clock)
    for num_past in PASTS:
        turns.grow(num_past)
        for num_rows in SIZES:
            turns.steps(num_rows)
            add(str(num_past), num_rows, turns.steps(num_rows))
    return rows


def describe(row: dict[str, Any]) -> str:
    return (
        f"{row['threads']} threads, past {row['past']}, n = {row['n']}: canonical {row['canonical']:.2f} ms, "
        f"fused {row['fused']:.2f} ms, {row['ratio']:.3f} of it"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=PROJECT / "build/bench_stage", help="where exports are kept")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="count processor time, on one thread, not the clock's")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    clock = time.process_time if options.cpu_time else time.perf_counter
    rows = measure(export_both(options.folder), options.threads, clock)
    print(json.dumps({"rows": rows}) if options.json else "\n".join(describe(row) for row in rows))


if __name__ == "__main__":
    main()
