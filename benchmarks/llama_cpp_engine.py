"""llama.cpp as an engine that is measured, through the C interface that the package llama-cpp-python has.

    python -m benchmarks.llama_cpp_engine ADDRESS:PORT     be an RPC server of one thread

Where two processes share the layers, the second one is started so.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.precisions import PROJECT
from benchmarks.row_cases import CONTEXT, PAST, Alone
from flowspec_edge.net.addresses import LOOPBACK


class LlamaCpp(Alone):
    """llama.cpp through its C interface: one batch of one sequence, and no sampler.

    Where there is an RPC ``server``, the last ``layers_there`` are there, of which the head counts as one.
    """

    def __init__(
        self, gguf: str, threads: int, flash: bool, cpu_time: bool, server: str | None = None, layers_there: int = 0
    ) -> None:
        import llama_cpp.llama_cpp as api

        super().__init__(cpu_time)
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
    command = [sys.executable, "-m", "benchmarks.llama_cpp_engine", endpoint]
    server = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL)
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


if __name__ == "__main__":
    Libraries().serve(sys.argv[1], threads=1)
