"""The client against a real `flowspec serve`, and the README's example as it stands there."""

import asyncio
import contextlib
import re
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest

from flowspec_edge import Client
from flowspec_edge.bundle import DEMO_BUNDLE
from flowspec_edge.node.process import node_processes
from tests.docs.documents import python_snippet
from tests.narrowing import present


@contextlib.asynccontextmanager
async def serving(*options: str) -> AsyncIterator[str]:
    """`flowspec serve` in a process of its own; gives its URL."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "flowspec_edge", "serve", *options), stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(60):
            line = (await present(process.stdout).readline()).decode()
            assert (await present(process.stdout).readline()).startswith(b"tools are called in a plain form")
            assert (await present(process.stdout).readline()).startswith(b"chat with it, and watch its boards: http://")
        yield present(re.search(r"http://[\d.]+:\d+", line)).group()
    finally:
        process.terminate()
        async with asyncio.timeout(10):
            assert await process.wait() == 0


def test_the_client_imports_neither_numpy_nor_onnxruntime() -> None:
    code = "import sys; from flowspec_edge import Client; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "aiohttp" in found
    assert not {"numpy", "onnxruntime", "zeroconf", "msgpack"} & set(found)


@pytest.mark.slow
async def test_a_served_ring_answers_cancels_and_survives_a_lost_node() -> None:
    async with (
        node_processes(2, DEMO_BUNDLE) as (cluster, nodes),
        serving("--port", "0", "--cluster", cluster, "--no-layers", "--wait", "2") as url,
        Client(url) as client,
        asyncio.timeout(60),
    ):
        answer = await client.complete("def main(", max_new_tokens=24, temperature=0.6, seed=2)
        assert len(answer.token_ids) == present(answer.statistics)["completion_tokens"] == 24
        again = await client.complete(
            "def main(", max_new_tokens=24, temperature=0.6, seed=2, schedule="autoregressive"
        )
        assert again.text == answer.text
        stopped = await client.complete(
            "def main(", max_new_tokens=24, temperature=0.6, seed=2, stop=[answer.text[9:12]]
        )
        assert stopped.finish_reason == "stop"
        assert answer.text.startswith(stopped.text)
        assert answer.text[9:12] not in stopped.text
        cancelled = client.generate("def main(", max_new_tokens=900, temperature=1.0)
        await anext(cancelled)
        await cancelled.aclose()
        nodes[0].kill()
        await nodes[0].process.wait()
        # Whoever asks first may meet the loss; after that a ring of those that are left answers.
        with contextlib.suppress(Exception):
            await client.complete("x", max_new_tokens=1)
        assert len((await client.complete("def main(", max_new_tokens=4)).token_ids) == 4


@pytest.mark.slow
async def test_nothing_is_kept_of_answers_that_nobody_holds() -> None:
    async with Client() as client:
        held = client.generate("def main(")
        client.generate("import ")
        assert list(client._answers) == [held]


async def test_the_readmes_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Against a server that is alone, and serves itself."""
    cluster = ("--cluster", f"readme-example-{secrets.token_hex(4)}")
    async with serving("--port", "0", *cluster) as url:
        await asyncio.to_thread(
            exec, python_snippet("README.md", "From Python").replace("http://127.0.0.1:8008", url), {}
        )
    assert "'completion_tokens': 48" in capsys.readouterr().out
