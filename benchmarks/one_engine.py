"""One engine in a process of its own, which runs what it is asked to: ours, or llama.cpp.

The argument is a job as JSON; each line of standard input is then a case, and each line printed the seconds of each of
its runs:

    python -m benchmarks.one_engine '{"engine": "ours", "bundle": DIR, "threads": 1}'
    python -m benchmarks.one_engine '{"engine": "llama.cpp", "gguf": FILE, "flash": true, "threads": 1}'

    {"rows": 4, "times": 10}      forwards of so many rows behind PAST others, with the logits of all of them
    {"prompt": 512, "times": 1}   forwards of a prompt, with the logits of its last row

Two processes of one thread each share the layers where the job says ``"parts": 2``: nodes of a ring here, and
llama.cpp with its RPC server there. A row is then a token that is written after the others, without drafts.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx

from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core.events import RunForward
from flowspec_edge.core.limits import PREFILL_ROWS
from flowspec_edge.core.rows import NO_PARENT, Row
from flowspec_edge.core.speculation.kv_slots import KvSlots
from flowspec_edge.engine.graphs import load_graph
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.padding import min_rows
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.manifest import load_manifest
from flowspec_edge.net.addresses import LOOPBACK
from flowspec_edge.net.directory import find_peers
from flowspec_edge.node.node import Node
from flowspec_edge.node.process import SEARCH_S, node_processes
from flowspec_edge.node.resources import NodeSettings, unique_name
from flowspec_edge.origin.opening import open_ring
from flowspec_edge.origin.ring import Ring
from flowspec_edge.version import __version__

PAST = 512
"""Rows in the cache when rows are timed."""
CONTEXT = 1024
WRITTEN = 33
"""Tokens that a ring writes at once: the first one ends the prompt's time, the others are timed."""
SESSION = 0
JOB = json.loads(sys.argv[1]) if __name__ == "__main__" else {}
clock = time.process_time if JOB.pop("cpu_time", False) else time.perf_counter
Case = dict[str, int]


def some_tokens(num_tokens: int) -> list[int]:
    """Ordinary tokens that every vocabulary has."""
    return [40 + number * 7919 % 200 for number in range(num_tokens)]


class Engine(Protocol):
    def times(self, case: Case) -> list[float]:
        """Seconds of each run of a case."""
        ...


class Alone:
    """An engine whose model is in its own process. Subclasses forget all rows but the first ones, and run rows."""

    num_cached = 0

    def keep(self, num_rows: int) -> None:
        """Forget all rows of the cache but the first ``num_rows``."""
        raise NotImplementedError

    def run(self, tokens: Sequence[int], num_logits: int) -> None:
        """Run a chain of rows behind those of the cache, and have the logits of the last ones."""
        raise NotImplementedError

    def times(self, case: Case) -> list[float]:
        past = PAST if "rows" in case else 0
        tokens = some_tokens(case["rows"] if past else case["prompt"])
        if self.num_cached < past:
            self.keep(0)
            self.run(some_tokens(past), 1)
        found = []
        for _ in range(case["times"]):
            self.keep(past)
            began = clock()
            self.run(tokens, len(tokens) if past else 1)
            found.append(clock() - began)
        return found


class OurEngine(Alone):
    """All layers of a bundle in its own precision, and its head."""

    def __init__(self, bundle: str, threads: int) -> None:
        directory = Path(bundle)
        manifest = load_manifest(directory)
        layers = 0, manifest.geometry.num_layers
        self._stage = StageRunner(directory, manifest, *layers, num_threads=threads)
        self._head = Head(directory, manifest, num_threads=threads)
        self._slots = KvSlots(CONTEXT)
        self._stage.open_cache(SESSION, CONTEXT)

    def keep(self, num_rows: int) -> None:
        self._slots.drop(self._slots.ids[num_rows:])
        self.num_cached = num_rows

    def run(self, tokens: Sequence[int], num_logits: int) -> None:
        for start in range(0, len(tokens), PREFILL_ROWS):
            part = tokens[start : start + PREFILL_ROWS]
            rows = [Row(id, id - 1 if id else NO_PARENT, token) for id, token in enumerate(part, self.num_cached)]
            forward = RunForward(SESSION, tuple(rows), None, self._slots.place(rows))
            hidden = self._stage.run(forward).hidden
            self.num_cached += len(rows)
        self._head.logits(hidden[-num_logits:])


class OurProducts:
    """The products of all layers and the head by themselves, each with rows of its own: what no graph over ONNX
    Runtime's kernels can be faster than.
    """

    def __init__(self, bundle: str, threads: int) -> None:
        directory = Path(bundle)
        manifest = load_manifest(directory)
        self._min_rows = min_rows(manifest.precision)
        *self._layers, self._head = (
            ProductGraph(directory / entry.file, threads) for entry in (*manifest.blocks, manifest.head)
        )

    def times(self, case: Case) -> list[float]:
        return [self._time(case) for _ in range(case["times"])]

    def _time(self, case: Case) -> float:
        num_rows = max(case["rows"], self._min_rows) if "rows" in case else PREFILL_ROWS
        began = clock()
        for _ in range(1 if "rows" in case else -(-case["prompt"] // PREFILL_ROWS)):
            for layer in self._layers:
                layer.run(num_rows)
        self._head.run(num_rows if "rows" in case else self._min_rows)
        return clock() - began


class ProductGraph:
    """The products of a graph's matrices, and nothing else of it."""

    def __init__(self, path: Path, threads: int) -> None:
        model = onnx.load(path)
        found = [node for node in model.graph.node if node.op_type in ("MatMulNBits", "MatMulInteger")]
        weights = {tensor.name: tensor for tensor in model.graph.initializer}
        inputs: dict[str, onnx.ValueInfoProto] = {}
        self._outputs = [node.output[0] for node in found]
        for node in found:
            is_bytes = node.op_type == "MatMulInteger"
            width = weights[node.input[1]].dims[0] if is_bytes else _attribute(node, "K")
            node.input[0] = f"rows.{width}.{is_bytes}"
            kind = onnx.TensorProto.UINT8 if is_bytes else onnx.TensorProto.FLOAT
            inputs[node.input[0]] = onnx.helper.make_tensor_value_info(node.input[0], kind, ["rows", width])
        results = [
            onnx.helper.make_tensor_value_info(
                node.output[0],
                onnx.TensorProto.INT32 if node.op_type == "MatMulInteger" else onnx.TensorProto.FLOAT,
                None,
            )
            for node in found
        ]
        used = [weights[name] for name in dict.fromkeys(name for node in found for name in node.input[1:]) if name]
        graph = onnx.helper.make_graph(found, "products", list(inputs.values()), results, used)
        del model.graph.initializer[:]
        alone = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
        with tempfile.TemporaryDirectory() as folder:
            onnx.save(alone, file := Path(folder) / "products.onnx")
            self._session = load_graph(file, threads)
        self._widths = {name: info.type.tensor_type for name, info in inputs.items()}

    def run(self, num_rows: int) -> None:
        self._session.run(self._outputs, self._rows(num_rows))

    @functools.cache  # noqa: B019 - lives as long as the process
    def _rows(self, num_rows: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng(0)
        found = {}
        for name, tensor in self._widths.items():
            size = num_rows, tensor.shape.dim[1].dim_value
            is_bytes = tensor.elem_type == onnx.TensorProto.UINT8
            found[name] = (
                random.integers(0, 256, size, np.uint8) if is_bytes else random.standard_normal(size, np.float32)
            )
        return found


def _attribute(node: onnx.NodeProto, name: str) -> int:
    return next(int(attribute.i) for attribute in node.attribute if attribute.name == name)


class LlamaCpp(Alone):
    """llama.cpp through its C interface: one batch of one sequence, and no sampler.

    Where there is an RPC ``server``, the last ``layers_there`` are there, of which the head counts as one.
    """

    def __init__(self, gguf: str, threads: int, flash: bool, server: str | None = None, layers_there: int = 0) -> None:
        import llama_cpp.llama_cpp as api

        self._api = api
        self._log = api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(self._log, None)
        api.llama_backend_init()
        of_model = api.llama_model_default_params()
        of_model.n_gpu_layers = 0
        if server is not None:
            Libraries().add_rpc_server(server)
            of_model.n_gpu_layers = layers_there
        self._model = api.llama_model_load_from_file(gguf.encode(), of_model)
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {gguf}")
        of_context = api.llama_context_default_params()
        of_context.n_ctx, of_context.n_batch, of_context.n_ubatch = CONTEXT, PAST, PAST
        of_context.n_threads = of_context.n_threads_batch = threads
        of_context.flash_attn_type = int(flash)
        of_context.no_perf = True
        self._context = api.llama_init_from_model(self._model, of_context)
        self._memory = api.llama_get_memory(self._context)
        self._batch = api.llama_batch_init(PAST, 0, 1)

    def keep(self, num_rows: int) -> None:
        self._api.llama_memory_seq_rm(self._memory, 0, num_rows, -1)
        self.num_cached = num_rows

    def run(self, tokens: Sequence[int], num_logits: int) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for number, token in enumerate(tokens):
            batch.token[number], batch.pos[number] = token, self.num_cached + number
            batch.n_seq_id[number], batch.seq_id[number][0] = 1, 0
            batch.logits[number] = number >= len(tokens) - num_logits
        if status := self._api.llama_decode(self._context, batch):
            raise SystemExit(f"llama_decode: {status}")
        self._api.llama_synchronize(self._context)
        self.num_cached += len(tokens)


class Libraries:
    """The libraries of llama.cpp that lie beside the one that its Python package has loaded."""

    def __init__(self) -> None:
        import llama_cpp.llama_cpp as api

        if not api.llama_supports_rpc():
            raise SystemExit("llama.cpp was built without RPC: see --help")
        folder = Path(api._lib._name).parent
        self._base, self._ggml, self._rpc = (
            ctypes.CDLL(str(folder / f"lib{name}.so")) for name in ("ggml-base", "ggml", "ggml-rpc")
        )

    def add_rpc_server(self, endpoint: str) -> None:
        """Have models loaded from now on put layers there."""
        add = self._rpc.ggml_backend_rpc_add_server
        add.restype, add.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
        self._ggml.ggml_backend_register.argtypes = [ctypes.c_void_p]
        self._ggml.ggml_backend_register(add(endpoint.encode()))

    def serve(self, endpoint: str, threads: int) -> None:
        """Be an RPC server that computes on this processor. Does not return."""
        find = self._ggml.ggml_backend_dev_by_type
        find.restype = ctypes.c_void_p
        devices = (ctypes.c_void_p * 1)(find(0))  # GGML_BACKEND_DEVICE_TYPE_CPU
        start = self._rpc.ggml_backend_rpc_start_server
        start.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p]
        start(endpoint.encode(), None, threads, 1, devices)


@contextlib.contextmanager
def rpc_server() -> Iterator[str]:
    """An RPC server of one thread in a process of its own; gives its endpoint."""
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        endpoint = f"{LOOPBACK}:{free.getsockname()[1]}"
    job = json.dumps({"engine": "rpc server", "endpoint": endpoint})
    server = subprocess.Popen([sys.executable, "-m", "benchmarks.one_engine", job], stdout=subprocess.DEVNULL)
    try:
        host, port = endpoint.split(":")
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection((host, int(port))):
                break
            time.sleep(0.1)
        yield endpoint
    finally:
        server.kill()
        server.wait()


class OurRing:
    """Two nodes of one thread, each in a process of its own, and the ring over them, without drafts."""

    def __init__(self, ring: Ring, runner: asyncio.Runner) -> None:
        self._ring, self._runner = ring, runner

    def times(self, case: Case) -> list[float]:
        if "prompt" in case:
            return [self._runner.run(self._write(case["prompt"], 1))[0] for _ in range(case["times"])]
        return self._runner.run(self._write(PAST, case["times"] + 1))[1:]

    async def _write(self, num_prompt: int, num_tokens: int) -> list[float]:
        """Seconds to each token from the one before it, to the first one from the question."""
        options = GenerateOptions(max_new_tokens=num_tokens, schedule="autoregressive", ignore_eos=True)
        times = [clock()]
        async with contextlib.aclosing(self._ring.generate(some_tokens(num_prompt), options)) as pieces:
            async for piece in pieces:
                times += [clock()] * len(piece.token_ids)
        return np.diff(times).tolist()


@contextlib.asynccontextmanager
async def our_ring(bundle: Bundle) -> AsyncIterator[Ring]:
    async with node_processes(2, bundle.directory) as (cluster, _):
        settings = NodeSettings(name=unique_name(), cluster=cluster, bundles=(bundle,), is_announced=False)
        found = await find_peers(
            settings.neighbourhood, node=settings.name, version=__version__, num_nodes=2, timeout_s=SEARCH_S
        )
        node = await Node.start(settings)
        try:
            async with open_ring(node, bundle, found) as ring:
                yield ring
        finally:
            await node.close()


@contextlib.contextmanager
def opened(job: dict[str, Any]) -> Iterator[Engine]:
    kind = job.pop("engine"), job.pop("parts", 1)
    if kind == ("products", 1):
        yield OurProducts(**job)
    elif kind == ("ours", 1):
        yield OurEngine(**job)
    elif kind == ("llama.cpp", 1):
        yield LlamaCpp(**job)
    elif kind == ("llama.cpp", 2):
        with rpc_server() as server:
            yield LlamaCpp(**job, server=server)
    else:
        with asyncio.Runner() as runner:
            opening = our_ring(Bundle.load(Path(job["bundle"])))
            ring = runner.run(opening.__aenter__())
            try:
                yield OurRing(ring, runner)
            finally:
                runner.run(opening.__aexit__(None, None, None))


def main(job: dict[str, Any]) -> None:
    if job["engine"] == "rpc server":
        Libraries().serve(job["endpoint"], 1)
    with opened(job) as engine:
        for line in sys.stdin:
            print(json.dumps(engine.times(json.loads(line))), flush=True)


if __name__ == "__main__":
    main(JOB)
