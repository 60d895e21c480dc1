"""One engine in a process of its own, which runs what it is asked to: ours, or llama.cpp.

The argument is a job as JSON; each line of standard input is then a case, and each line printed the seconds of each of
its runs:

    python -m benchmarks.one_engine '{"engine": "ours", "bundle": DIR, "threads": 1, "cpu_time": false}'
    python -m benchmarks.one_engine '{"engine": "products", "bundle": DIR, "threads": 1, "cpu_time": false}'
    python -m benchmarks.one_engine '{"engine": "llama.cpp", "gguf": FILE, "flash": true, "threads": 1, ...}'

    {"rows": 4, "times": 10}      forwards of so many rows behind PAST others, with the logits of all of them
    {"prompt": 512, "times": 1}   forwards of a prompt, with the logits of its last row

Two processes of one thread each share the layers where the engine is a ``ring``, and where llama.cpp's job says how
many ``layers_there`` are on its RPC server. A row of a ring is a token written after the others, without drafts.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.llama_cpp_engine import LlamaCpp, rpc_server
from benchmarks.products_alone import ProductsAlone
from benchmarks.row_cases import CONTEXT, PAST, Alone, Case, Engine, some_tokens
from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core.events import RunForward
from flowspec_edge.core.limits import PREFILL_ROWS
from flowspec_edge.core.rows import NO_PARENT, Row
from flowspec_edge.core.speculation.kv_slots import KvSlots
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.manifest import load_manifest
from flowspec_edge.net.directory import find_peers
from flowspec_edge.node.node import Node
from flowspec_edge.node.process import SEARCH_S, node_processes
from flowspec_edge.node.resources import NodeSettings, unique_name
from flowspec_edge.origin.opening import open_ring
from flowspec_edge.origin.ring import Ring
from flowspec_edge.version import __version__

SESSION = 0


class OurEngine(Alone):
    """All layers of a bundle in its own precision, and its head."""

    def __init__(self, bundle: str, threads: int, cpu_time: bool) -> None:
        super().__init__(cpu_time)
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


class OurRing:
    """Two nodes of one thread, each in a process of its own, and the ring over them, without drafts."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring

    async def times(self, case: Case) -> list[float]:
        """As of any engine. Between two cases the loop goes on, for the ring's heartbeats."""
        if "prompt" in case:
            return [(await self._write(case["prompt"], 1))[0] for _ in range(case["times"])]
        return (await self._write(PAST, case["times"] + 1))[1:]

    async def _write(self, num_prompt: int, num_tokens: int) -> list[float]:
        """Seconds to each token from the one before it, to the first one from the question."""
        options = GenerateOptions(max_new_tokens=num_tokens, schedule="autoregressive", ignore_eos=True)
        times = [time.perf_counter()]
        async with contextlib.aclosing(self._ring.generate(some_tokens(num_prompt), options)) as pieces:
            async for piece in pieces:
                times += [time.perf_counter()] * len(piece.token_ids)
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
def opened(kind: str, job: dict[str, Any]) -> Iterator[Engine]:
    """The engine that a job asks for, in one process or with an RPC server."""
    if kind == "ours":
        yield OurEngine(**job)
    elif kind == "products":
        yield ProductsAlone(**job)
    elif "layers_there" in job:
        with rpc_server() as server:
            yield LlamaCpp(**job, server=server)
    else:
        yield LlamaCpp(**job)


async def run_ring(bundle: Path) -> None:
    async with our_ring(Bundle.load(bundle)) as ring:
        while line := await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(await OurRing(ring).times(json.loads(line))), flush=True)


def main() -> None:
    job = json.loads(sys.argv[1])
    kind = job.pop("engine")
    if kind == "ring":
        asyncio.run(run_ring(Path(job["bundle"])))
        return
    with opened(kind, job) as engine:
        for line in sys.stdin:
            print(json.dumps(engine.times(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
