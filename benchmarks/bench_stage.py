"""How fast a stage is compared with what memory and processor allow, for every precision, chunk size, past and number
of threads.

    python benchmarks/bench_stage.py              two model shapes; the first run exports them (minutes, 5 GB of disk)
    python benchmarks/bench_stage.py --quick      one shape, one thread, four precisions, two sizes
    python benchmarks/bench_stage.py --cpu-time   on a machine that others use too: one thread, and its processor time
    python benchmarks/bench_stage.py --json

The layers have the shapes of TinyLlama 1.1B and Llama 3.2 3B and random weights, are exported as any checkpoint is, and
are more than the processor's caches hold. A bare run is ONNX Runtime's alone, with everything bound before. A step is
what a node does for a chunk: slots, inputs, binding, compaction of the cache, the run, and the way to the stage's
thread and back. Bare runs and steps take turns, and so do a matrix-vector and a matrix-matrix product of BLAS in
float32, so that other work on the machine slows all of them alike. ONNX Runtime's product of one large matrix is
measured too: it shows how much of the memory's rate the kernels reach by themselves, without a graph around them. At
the end the layers are compared with the same ones with the fused attention operator.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowspec_edge.manifest import FORMAT_VERSION, load_manifest

PROJECT = Path(__file__).resolve().parents[1]
PRECISIONS = ("fp32", "fp16", "int8", "w8a8", "int4")
SIZES, PASTS, THREADS = (1, 4, 16, 32, 64), (128, 1024), (1, 2)
WHOLE = PRECISIONS, SIZES, PASTS
QUICK = ("fp32", "int8", "w8a8", "int4"), (1, 16), (128,)
INSTRUCTIONS = {"avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimddp", "i8mm"}
"""The flags of /proc/cpuinfo that decide which kernels run."""
SMALL_PARTS = {
    "vocab_size": 2048,  # of the demo model's tokenizer; embedding and head are not measured here
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@dataclass(frozen=True)
class Shape:
    """The shape of a published model's layers: fields of its config.json, with fewer layers."""

    name: str
    config: dict[str, Any]


@dataclass(frozen=True)
class How:
    """Whether processor time is counted. It says nothing of two threads that work at once, so then there is one."""

    is_cpu_time: bool

    @property
    def threads(self) -> tuple[int, ...]:
        return THREADS[:1] if self.is_cpu_time else THREADS

    def job(self, threads: int) -> dict[str, Any]:
        return {"threads": threads, "cpu_time": self.is_cpu_time}


SHAPES = (
    Shape(
        "tinyllama-1.1b",
        {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 4,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "rope_theta": 10000.0,
        },
    ),
    Shape(
        "llama-3.2-3b",
        {
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 2,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_theta": 500000.0,
        },
    ),
)


def export(shape: Shape, folder: Path, block_size: int = 1) -> Path:
    """A bundle of that shape in every precision, taken from ``folder`` where an earlier run has left it there."""
    bundle = folder / f"{shape.name}-{block_size}-v{FORMAT_VERSION}"
    if (bundle / "manifest.json").exists():
        return bundle
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    report(f"{bundle.name}: exporting random weights in {', '.join(PRECISIONS)} ...")
    checkpoint = folder / f"{bundle.name}.checkpoint"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL_PARTS, **shape.config))
    model.half().save_pretrained(checkpoint)
    shutil.copy(PROJECT / "exporter/demo_model/target/tokenizer.json", checkpoint)
    command = [
        sys.executable,
        "-m",
        "exporter",
        str(checkpoint),
        "--precision",
        PRECISIONS[0],
        "--also",
        *PRECISIONS[1:],
    ]
    command += ["--block-size", str(block_size), "--out", str(bundle), "--force"]
    subprocess.run(command, check=True, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    shutil.rmtree(checkpoint)
    return bundle


def measure(
    bundle: Path, precisions: Sequence[str], sizes: Sequence[int], pasts: Sequence[int], how: How, threads: int
) -> Iterator[Any]:
    """Measure in a process of its own, and yield its rows as they come, each with the figures that follow from it."""
    manifest = load_manifest(bundle)
    job = {"bundle": str(bundle), "precisions": precisions, "sizes": sizes, "pasts": pasts, **how.job(threads)}
    command = [sys.executable, "-m", "benchmarks.stage_measurement", json.dumps(job)]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first_ms = 0.0
        for line in process.stdout:
            row = json.loads(line)
            weights = sum(
                block.memory_bytes for block in manifest.blocks_of(0, manifest.geometry.num_layers, row["precision"])
            )
            first_ms = row["bare_ms"] if row["n"] == sizes[0] else first_ms
            seconds = row["bare_ms"] / 1000
            yield {
                **row,
                "threads": threads,
                "weight_bytes": weights,
                "share_of_matrix_vector": weights / seconds / 1e9 / row["gigabytes_per_s"],
                "times_the_first": row["bare_ms"] / first_ms,
                "overhead": row["overhead_ms"] / row["bare_ms"],
            }
    if process.returncode:
        raise SystemExit(f"bench_stage: the measuring process of {bundle.name} ended with {process.returncode}")


def measure_all(folder: Path, how: How, is_quick: bool) -> list[dict[str, Any]]:
    rows = []
    for shape in SHAPES[:1] if is_quick else SHAPES:
        bundle = export(shape, folder)
        for threads in how.threads[:1] if is_quick else how.threads:
            precisions, sizes, pasts = QUICK if is_quick else WHOLE
            for row in measure(bundle, precisions, sizes, pasts, how, threads):
                rows.append({"shape": shape.name, **row})
                report(describe(rows[-1]))
    return rows


def measure_products(how: How) -> list[dict[str, Any]]:
    """Measure the product of one matrix by itself, by 1 and by 16 rows."""
    rows = []
    for threads in how.threads:
        job = {"products": [1, 16], **how.job(threads)}
        command = [sys.executable, "-m", "benchmarks.stage_measurement", json.dumps(job)]
        done = subprocess.run(command, check=True, cwd=PROJECT, stdout=subprocess.PIPE, text=True)
        rows += [{"threads": threads, **json.loads(line)} for line in done.stdout.splitlines()]
    for row in rows:
        report(describe_product(row))
    return rows


def describe_product(row: dict[str, Any]) -> str:
    return (
        f"one matrix alone, {row['product']}, {row['threads']} threads, {row['rows']} rows: {row['ms']:.1f} ms, "
        f"{row['share_of_matrix_vector']:.0%} of matrix-vector"
    )


def describe_machine(how: How) -> dict[str, Any]:
    """What the figures depend on: the processor and its instructions, the load, the clock that counts,
    and the commit.
    """
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    return {
        "clock": "processor time" if how.is_cpu_time else "wall",
        "processor": fields.get("model name", platform.machine()),
        "num_cores": os.cpu_count(),
        "vector_instructions": sorted(flags & INSTRUCTIONS),
        "load_average": os.getloadavg()[0],
        "commit": commit.stdout.strip(),
    }


def measure_layouts(folder: Path, how: How) -> list[dict[str, Any]]:
    """Compare layers that are chained as graphs of one layer each with one graph of all layers."""
    shape = SHAPES[0]
    bundles = {"chained": export(shape, folder), "one graph": export(shape, folder, shape.config["num_hidden_layers"])}
    job = {
        "layouts": {name: str(bundle) for name, bundle in bundles.items()},
        "precisions": ["fp32", "w8a8"],
        "sizes": [1, 16, 64],
    }
    rows = []
    for threads in how.threads:
        command = [sys.executable, "-m", "benchmarks.stage_measurement", json.dumps({**job, **how.job(threads)})]
        done = subprocess.run(command, check=True, cwd=PROJECT, stdout=subprocess.PIPE, text=True)
        rows += [{"threads": threads, **json.loads(line)} for line in done.stdout.splitlines()]
        for row in rows[-6:]:
            report(
                f"{row['precision']}, {threads} threads, n = {row['n']}: chained takes {row['ratio']:.3f} of one graph"
            )
    return rows


def measure_attention(folder: Path, how: How) -> list[dict[str, Any]]:
    """Compare layers as they are with layers that have the fused attention operator (attention_cost.py)."""
    rows: list[dict[str, Any]] = []
    for threads in how.threads:
        command = [sys.executable, "-m", "benchmarks.attention_cost", "--json", "--folder", str(folder)]
        command += ["--threads", str(threads)]
        command += ["--cpu-time"] if how.is_cpu_time else []
        rows += json.loads(subprocess.run(command, check=True, cwd=PROJECT, stdout=subprocess.PIPE).stdout)["rows"]
    return rows


def describe_attention(row: dict[str, Any]) -> str:
    return (
        f"attention, {row['threads']} threads, past {row['past']}, n = {row['n']}: {row['canonical']:.2f} ms, "
        f"{row['ratio']:.3f} of what fused attention takes"
    )


def describe(row: dict[str, Any]) -> str:
    return (
        f"{row['shape']} {row['precision']}, {row['threads']} threads, past {row['past']}, n = {row['n']}: "
        f"{row['bare_ms']:.1f} ms, {row['share_of_matrix_vector']:.0%} of matrix-vector, step {row['overhead']:+.1%}"
    )


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: milliseconds of the bare run by chunk size, then how they compare with the
    machine's own rates.
    """
    lines = []
    sizes = list(dict.fromkeys(row["n"] for row in rows))
    heading = " | ".join(f"n = {size}" for size in sizes)
    lines.append(
        f"| shape | threads | past | precision | {heading} | of matrix-vector, n = {sizes[0]} | n = 16 over n = 1 "
        "| step over bare |"
    )
    lines.append("|---|---|---|---|" + "---:|" * (len(sizes) + 3))
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["shape"], row["threads"], row["past"], row["precision"]), []).append(row)
    for key, group in groups.items():
        times = " | ".join(f"{row['bare_ms']:.1f}" for row in group)
        sixteen = next((row["times_the_first"] for row in group if row["n"] == 16), float("nan"))
        overheads = sorted(row["overhead"] for row in group)
        lines.append(
            f"| {' | '.join(map(str, key))} | {times} | {group[0]['share_of_matrix_vector']:.0%} | {sixteen:.2f} "
            f"| {overheads[len(overheads) // 2]:+.1%} |"
        )
    rates = sorted(row["gigabytes_per_s"] for row in rows)
    flops = sorted(row["gigaflops"] for row in rows)
    lines.append(
        f"\nBLAS in float32 on this machine, medians: {rates[len(rates) // 2]:.1f} GB/s matrix-vector, "
        f"{flops[len(flops) // 2]:.0f} GFLOP/s matrix-matrix (all numbers of threads together)."
    )
    return "\n".join(lines)


def report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a glance: well under a minute once exported")
    parser.add_argument(
        "--folder", type=Path, default=PROJECT / "build/bench_stage", help="where exported shapes are kept"
    )
    parser.add_argument("--cpu-time", action="store_true", help="count processor time on one thread, not the clock's")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    how = How(options.cpu_time)
    began, machine = time.monotonic(), describe_machine(how)
    rows = measure_all(options.folder, how, options.quick)
    products = [] if options.quick else measure_products(how)
    layouts = [] if options.quick else measure_layouts(options.folder, how)
    attention = [] if options.quick else measure_attention(options.folder.resolve(), how)
    if options.json:
        print(
            json.dumps(
                {"machine": machine, "rows": rows, "products": products, "layouts": layouts, "attention": attention}
            )
        )
        return
    print(", ".join(f"{name}: {value}" for name, value in machine.items()), end="\n\n")
    print(format_table(rows))
    for row in products:
        print(describe_product(row))
    for row in layouts:
        print(
            f"{row['precision']}, {row['threads']} threads, n = {row['n']}: chained graphs take {row['ratio']:.3f} "
            "of one graph's time"
        )
    for row in attention:
        print(describe_attention(row))
    report(f"done in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
