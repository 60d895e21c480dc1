"""Measures one stage on one number of threads: its whole step, the bare run in it, and the rates that the machine
reaches.

The argument is a job as JSON, of one of three kinds; each line printed is a JSON object:

    {"bundle": ..., "precisions": [...], "sizes": [...], "pasts": [...], "threads": 1}
    {"layouts": {NAME: BUNDLE, ...}, "precisions": [...], "sizes": [...], "threads": 1}
    {"products": [1, 16], "threads": 1}

    python -m benchmarks.stage_measurement '{"products": [1, 16], "threads": 1}'

It is a process of its own because BLAS reads its number of threads once, when it starts.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

JOB = json.loads(sys.argv[1])
os.environ["OPENBLAS_NUM_THREADS"] = str(JOB["threads"])
os.environ["OPENBLAS_THREAD_TIMEOUT"] = "4"  # the shortest; threads that wait longer would slow what is measured next

import numpy as np  # noqa: E402 - OpenBLAS reads both when it is loaded

from flowspec_edge.core import events as ev  # noqa: E402
from flowspec_edge.core.rows import NO_PARENT, Row  # noqa: E402
from flowspec_edge.core.speculation.kv_slots import KvSlots  # noqa: E402
from flowspec_edge.engine.huge_pages import on_huge_pages  # noqa: E402
from flowspec_edge.engine.stage_runner import StageRunner  # noqa: E402
from flowspec_edge.manifest import HIDDEN, HIDDEN_OUT, load_manifest  # noqa: E402

clock = time.process_time if JOB.get("cpu_time") else time.perf_counter
SESSION = 1
KEPT = 2
"""Of every three rows of a chunk the first two die, about as many as in a draft tree; the third moves up."""
SPENT_S, NUM_LEAST, NUM_MOST = 2.0, 7, 41
"""How long one size is measured, in seconds, and how many times at least and at most."""
MATRIX = (8192, 8192)  # float32: 268 MB, far beyond the caches
PRODUCT = 2048
LAYOUT_PAST = 128
ALONE = (2048, 16384)
"""Inputs and outputs of the product that is measured alone. It has as many inputs as TinyLlama's layers, and in float32
(134 MB) it exceeds the processor's caches. With 8-bit weights it has four times as many outputs.
"""


class MachineRates:
    """The rates that a matrix-vector and a matrix-matrix product of float32 reach in BLAS."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self._matrix = random.standard_normal(MATRIX, dtype=np.float32)
        self._vector = random.standard_normal(MATRIX[1], dtype=np.float32)
        self._square = self._matrix[:PRODUCT, :PRODUCT].copy()

    def gigabytes_per_s(self) -> float:
        """The rate at which one matrix-vector product reads its matrix."""
        return self._matrix.nbytes / _seconds(lambda: self._matrix @ self._vector) / 1e9

    def gigaflops(self) -> float:
        return 2 * PRODUCT**3 / _seconds(lambda: self._square @ self._square) / 1e9


class StageUnderTest:
    """A stage of all layers of a bundle in one precision, with ``num_past`` rows in its cache and hidden
    rows as input.
    """

    def __init__(self, bundle: Path, precision: str, num_past: int, largest: int) -> None:
        manifest = load_manifest(bundle)
        self._num_layers = manifest.geometry.num_layers
        self._runner = StageRunner(
            bundle, manifest, 0, self._num_layers, num_threads=JOB["threads"], precision=precision
        )
        self._slots = KvSlots(num_past + 2 * largest)
        self._runner.open_cache(SESSION, self._slots.capacity)
        size = (num_past + largest, manifest.geometry.hidden_size)
        self._rows = np.random.default_rng(0).standard_normal(size).astype(np.float32)
        self._next_id = 0
        for start in range(0, num_past, 128):
            self._runner.run(self._forward(min(128, num_past - start)))
        self.num_past = num_past

    def _forward(self, num_rows: int) -> ev.RunForward:
        """The forward that the core decides on for a chunk: one level of the tree, below the cache's last row."""
        parent = self._slots.ids[-1] if self._slots.ids else NO_PARENT
        rows = [Row(self._next_id + number, parent, 1) for number in range(num_rows)]
        self._next_id += num_rows
        return ev.RunForward(SESSION, tuple(rows), self._rows[:num_rows], self._slots.place(rows))

    def forget(self, num_rows: int) -> None:
        """Drop the last rows: first most of them, so that the rest move up with the next forward, then the rest."""
        ids = self._slots.ids[-num_rows:]
        self._slots.drop([id for place, id in enumerate(ids) if place % 3 < KEPT])
        self._slots.drop([id for place, id in enumerate(ids) if place % 3 >= KEPT])

    def bare(self, num_rows: int) -> Callable[[], None]:
        """A function that runs the layers and does nothing else: everything is bound before."""
        forward = self._forward(num_rows)
        self._runner.run(forward)
        self._slots.drop([row.id for row in forward.rows])
        session, norm = self._runner._sessions[SESSION], self._runner._final_norm
        assert session.step is not None and norm is not None, "a stage of all layers ends with the final norm"
        rows = {HIDDEN: session.step.rows[len(self._runner._blocks) % 2]}
        bound: list[Callable[[], Any]] = [
            functools.partial(block.run_bound, binding)
            for (_, _, block), binding in zip(self._runner._blocks, session.bindings, strict=True)
        ]
        bound.append(functools.partial(norm.run, [HIDDEN_OUT], rows))

        def run() -> None:
            for run_bound in bound:
                run_bound()

        return run

    async def step(self, executor: ThreadPoolExecutor, num_rows: int) -> None:
        """A step as a node does it: slots, inputs, the way to the stage's thread, compaction, binding, run, and the way
        back.
        """
        forward = self._forward(num_rows)
        await asyncio.get_running_loop().run_in_executor(executor, self._runner.run, forward)


async def measure(stage: StageUnderTest, num_rows: int) -> dict[str, float]:
    """Medians of the bare run, of the whole step and of their difference, measured in turns."""
    bare = stage.bare(num_rows)
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1) as executor:
        bares: list[float] = []
        steps: list[float] = []
        until = time.monotonic() + SPENT_S
        while len(bares) < NUM_LEAST or (len(bares) < NUM_MOST and time.monotonic() < until):
            # The bare run takes the same thread as the step, with its caches and its pool.
            bares.append(await loop.run_in_executor(executor, _seconds, bare, 1))
            began = clock()
            await stage.step(executor, num_rows)
            steps.append(clock() - began)
            stage.forget(num_rows)
    return {
        "bare_ms": median(bares) * 1000,
        "step_ms": median(steps) * 1000,
        "overhead_ms": median(step - bare for step, bare in zip(steps, bares, strict=True)) * 1000,
    }


def measure_products() -> None:
    """Print, by precision and number of rows, how ONNX Runtime's product of one large matrix compares with BLAS's."""
    rates = MachineRates()
    for precision in ("fp32", "w8a8"):
        session, rows = _open_product(precision)
        for num_rows in JOB["products"]:
            feed = {"rows": np.repeat(rows, num_rows, axis=0)}
            multiply = functools.partial(session.run, None, feed)
            turns = [(_seconds(multiply, 1), rates.gigabytes_per_s()) for _ in range(NUM_LEAST)]
            seconds, rate = (median(values) for values in zip(*turns, strict=True))
            found = {"ms": seconds * 1000, "share_of_matrix_vector": 4 * ALONE[0] * ALONE[1] / seconds / 1e9 / rate}
            print(json.dumps({"product": precision, "rows": num_rows, **found}), flush=True)


def _open_product(precision: str) -> tuple[Any, Any]:
    """A session that multiplies ``rows`` by a weight as graphs of that precision do, and one row as its input."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    from flowspec_edge.manifest import SESSION_SETTINGS

    random = np.random.default_rng(0)
    num_in, num_out = ALONE
    if precision == "fp32":
        weight = random.standard_normal((num_in, num_out), np.float32)
        row = random.standard_normal((1, num_in), np.float32)
        node, kinds = helper.make_node("MatMul", ["rows", "weight"], ["out"]), (TensorProto.FLOAT, TensorProto.FLOAT)
    else:
        num_out *= 4
        weight = random.integers(-127, 128, (num_in, num_out), np.int8)
        row = random.integers(0, 256, (1, num_in), np.uint8)
        node = helper.make_node("MatMulInteger", ["rows", "weight", "zero_point"], ["out"])
        kinds = TensorProto.UINT8, TensorProto.INT32
    constants = [
        numpy_helper.from_array(weight, "weight"),
        numpy_helper.from_array(np.array(128, np.uint8), "zero_point"),
    ]
    given = helper.make_tensor_value_info("rows", kinds[0], ["num_rows", num_in])
    found = helper.make_tensor_value_info("out", kinds[1], ["num_rows", num_out])
    graph = helper.make_graph([node], "product", [given], [found], constants[: len(node.input) - 1])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = JOB["threads"]
    for setting in (*SESSION_SETTINGS, ("session.intra_op.allow_spinning", "0")):
        options.add_session_config_entry(*setting)
    with on_huge_pages():
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]), row


def _seconds(run: Callable[[], Any], num_times: int = 5) -> float:
    times = []
    for _ in range(num_times):
        began = clock()
        run()
        times.append(clock() - began)
    return median(times)


def measure_sizes() -> None:
    """Print a JSON object for each precision, past and chunk size."""
    rates = MachineRates()
    for precision in JOB["precisions"]:
        for num_past in JOB["pasts"]:
            stage = StageUnderTest(Path(JOB["bundle"]), precision, num_past, max(JOB["sizes"]))
            for num_rows in JOB["sizes"]:
                rate = rates.gigabytes_per_s()
                found = asyncio.run(measure(stage, num_rows))
                rate = (rate + rates.gigabytes_per_s()) / 2
                found |= {"gigabytes_per_s": rate, "gigaflops": rates.gigaflops()}
                print(json.dumps({"precision": precision, "past": num_past, "n": num_rows, **found}), flush=True)


def compare_layouts() -> None:
    """Print how long the first layout takes relative to the second, as the median over turns."""
    for precision in JOB["precisions"]:
        stages = [
            StageUnderTest(Path(path), precision, LAYOUT_PAST, max(JOB["sizes"])) for path in JOB["layouts"].values()
        ]
        for num_rows in JOB["sizes"]:
            runs = [stage.bare(num_rows) for stage in stages]
            turns = [[_seconds(run, 1) for run in runs] for _ in range(NUM_MOST)]
            ratio = median(first / second for first, second in turns)
            print(json.dumps({"precision": precision, "n": num_rows, "ratio": ratio}), flush=True)


if __name__ == "__main__":
    kinds = {"layouts": compare_layouts, "products": measure_products}
    next((run for kind, run in kinds.items() if kind in JOB), measure_sizes)()
