"""The commands as a user runs them: real processes, real mDNS, and one clear sentence when something is wrong."""

import asyncio
import contextlib
import json
import secrets
import shutil
import signal
import socket
import sys
from pathlib import Path

import pytest

from flowspec_edge.bundle import DEMO_BUNDLE
from flowspec_edge.core.speculation.schedules import SCHEDULES
from flowspec_edge.node.process import node_processes
from tests.narrowing import present

pytestmark = pytest.mark.slow

COMMAND_S = 60


async def start(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "flowspec_edge", *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def run(*arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    process = await start(*arguments)
    async with asyncio.timeout(COMMAND_S):
        out, err = await process.communicate()
    return present(process.returncode), out.decode(), err.decode()


def assert_refused(result: tuple[int, str, str], *texts: str) -> None:
    """Non-zero, no traceback, one last line that says what and what to do."""
    status, _, err = result
    assert status == 1
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("flowspec ")
    for text in texts:
        assert text in last


async def test_the_demo_shows_every_trip_and_the_text() -> None:
    status, out, _ = await run("demo", "--nodes", "2", "--max-new-tokens", "20", "--prompt", "def area(width, height):")
    assert status == 0
    assert "accepted" in out and "pruned" in out and "drafted" in out
    assert "identical to the unsplit model: yes" in out
    assert "acceptance length" in out and "rows sent" in out


async def test_the_demo_serves_a_chat_and_asks_it() -> None:
    options = ("--nodes", "2", "--port", "0", "--max-new-tokens", "20", "--prompt", "def area(width, height):")
    status, out, err = await run("demo", "--chat", *options)
    assert (status, err) == (0, "")
    assert "chat with it" in out and "def area(width, height):" in out and "= 20 tokens" in out
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        status, _, err = await run("demo", "--chat", "--nodes", "1", "--port", str(taken.getsockname()[1]))
    assert status == 1 and "the server has ended; why stands above" in err and "in use" in err


def children_of(pid: int) -> set[Path]:
    """Processes that this one started and that have not ended."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.add(path.parent)
    return found


async def test_the_demo_stops_its_nodes_on_ctrl_c() -> None:
    process = await start("demo", "--nodes", "2", "--max-new-tokens", "900")
    async with asyncio.timeout(COMMAND_S):
        while not (await present(process.stdout).readline()).startswith(b"prompt"):
            pass
        nodes = children_of(process.pid)
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in err.decode()
    assert len(nodes) == 2
    assert not [node for node in nodes if node.exists()]


async def test_generate_and_devices_find_the_nodes() -> None:
    async with node_processes(2, DEMO_BUNDLE) as (cluster, nodes):
        search = ("--cluster", cluster, "--nodes", "2")
        options = (*search, "--max-new-tokens", "8", "--equal-split")
        status, out, err = await run("generate", "def main(", *options, "--json")
        assert status == 0, err
        report = json.loads(out)
        assert len(report["token_ids"]) == 8
        assert [stage["node"] for stage in report["ring"]] == [node.name for node in nodes]
        status, streamed, err = await run("generate", "def main(", *options)
        assert (status, streamed) == (0, report["text"] + "\n")
        assert "tokens/s" in err
        status, out, _ = await run("devices", *search, "--json")
        assert [(device["node"], device["state"]) for device in json.loads(out)] == [(n.name, "ready") for n in nodes]


async def test_nodes_killed_while_they_serve() -> None:
    """The text goes on over the one that is left, and is the same; with none left it ends and says what is missing."""
    options = ("--max-new-tokens", "300", "--temperature", "1", "--schedule", "autoregressive", "--equal-split")
    async with node_processes(2, DEMO_BUNDLE) as (cluster, nodes):
        process = await start("generate", "def main(", "--cluster", cluster, "--nodes", "2", *options)
        async with asyncio.timeout(COMMAND_S):
            first = await present(process.stdout).read(1)
            nodes[1].kill()
            out, errors = await process.communicate()
        assert process.returncode == 0, errors.decode()
        assert f"the ring was lost ({nodes[1].name})" in errors.decode()
        search = ("--cluster", cluster, "--nodes", "1")
        status, undisturbed, err = await run("generate", "def main(", *search, *options)
        assert status == 0, err
        assert (first + out).decode() == undisturbed

        process = await start("generate", "def main(", *search, *options, "--wait-for-boards", "1")
        async with asyncio.timeout(COMMAND_S):
            await present(process.stdout).read(1)
            nodes[0].kill()
            _, errors = await process.communicate()
    home = f"layers [0, 8) of {nodes[0].name} have no home"
    told = (present(process.returncode), "", errors.decode())
    assert_refused(told, home, "no board came within 1 s (--wait-for-boards)")
    assert f"flowspec generate: waiting for boards: {home}" in errors.decode()


async def test_plan_shows_what_generate_then_does() -> None:
    async with node_processes(2, DEMO_BUNDLE) as (cluster, nodes):
        search = ("--cluster", cluster, "--nodes", "2")
        status, out, err = await run("plan", *search, "--json")
        assert status == 0, err
        plan = json.loads(out)
        names = {node.name for node in nodes}
        served = [stage["node"] for stage in plan["stages"]]
        assert {*served, *(out["node"] for out in plan["left_out"])} == names
        assert plan["tokens_per_s"] > 0 and plan["one_board_alone"] and plan["one_more"]
        assert plan["drafts"] == "eagle1 head, repetitions of the text"
        status, out, err = await run("generate", "def main(", *search, "--max-new-tokens", "20", "--json")
        assert status == 0, err
        report = json.loads(out)
        assert names >= {stage["node"] for stage in report["ring"]}
        assert sum(stage["stop"] - stage["start"] for stage in report["ring"]) == 8
        assert report["prediction"]["predicted_tokens_per_s"] > 0
        status, out, _ = await run("plan", *search)
        assert status == 0 and "tokens/s with schedule flowspec" in out and "one board alone" in out
        assert out.splitlines()[-1] == f"drafts: {plan['drafts']}"


async def test_the_plan_of_a_bundle_without_a_head_says_so(tmp_path: Path) -> None:
    bundle = shutil.copytree(DEMO_BUNDLE, tmp_path / "headless")
    path = bundle / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "drafter": None}))
    (bundle / "manifest.sha256").unlink()
    async with node_processes(2, bundle) as (cluster, _):
        status, out, err = await run("plan", str(bundle), "--cluster", cluster, "--nodes", "2")
        assert status == 0, err
        assert out.splitlines()[-1] == "drafts: repetitions of the text alone (this bundle has no draft head)"


async def test_no_nodes_and_too_few() -> None:
    nobody = ("--cluster", "nobody", "--wait", "0.5")
    assert_refused(await run("generate", "x", *nobody, "--nodes", "1"), "no node", "flowspec node")
    status, out, err = await run("generate", "def main(", *nobody, "--max-new-tokens", "8", "--equal-split", "--json")
    report = json.loads(out)
    assert status == 0 and "this process serves all layers itself: no node of cluster nobody found" in err
    assert [(stage["start"], stage["stop"]) for stage in report["ring"]] == [(0, 8)] and len(report["token_ids"]) == 8
    async with node_processes(1, DEMO_BUNDLE) as (cluster, _):
        result = await run("generate", "x", "--cluster", cluster, "--nodes", "2", "--wait", "4")
        assert_refused(result, "1 of 2 nodes", "--nodes")


async def test_too_little_memory() -> None:
    async with node_processes(2, DEMO_BUNDLE, "--memory", "61") as (cluster, _):
        result = await run("generate", "x", "--cluster", cluster, "--nodes", "2")
        assert_refused(result, "MiB", "add a node")


async def test_a_prompt_longer_than_the_context() -> None:
    async with node_processes(1, DEMO_BUNDLE) as (cluster, _):
        result = await run("generate", "x = 1\n" * 2000, "--cluster", cluster, "--nodes", "1")
        assert_refused(result, "the model's context holds 1024", "shorten")


async def test_missing_broken_and_newer_bundles(tmp_path: Path) -> None:
    assert_refused(await run("generate", "x", "--bundle", str(tmp_path / "none")), "no model bundle", "flowspec-export")
    broken = shutil.copytree(DEMO_BUNDLE, tmp_path / "broken")
    block = broken / "blocks/layers-003-004.onnx"
    block.write_bytes(block.read_bytes()[:1000])
    assert_refused(await run("node", "--bundle", str(broken)), "layers-003-004.onnx", "again")
    newer = shutil.copytree(DEMO_BUNDLE, tmp_path / "newer")
    manifest = json.loads((newer / "manifest.json").read_text())
    (newer / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    assert_refused(await run("demo", "--bundle", str(newer)), "format version 99", "upgrade")


async def test_a_damaged_block_is_named_by_the_node_that_loads_it(tmp_path: Path) -> None:
    damaged = shutil.copytree(DEMO_BUNDLE, tmp_path / "damaged")
    block = damaged / "blocks/layers-003-004.onnx"
    data = bytearray(block.read_bytes())
    data[len(data) // 2] ^= 0xFF
    block.write_bytes(data)
    result = await run("demo", "--nodes", "2", "--bundle", str(damaged), "--json")
    assert_refused(result, "layers-003-004.onnx", "damaged")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("generate", "x", "--temperature", "-1"), "temperature is -1.0"),
        (("generate", "x", "--max-new-tokens", "0"), "max_new_tokens is 0"),
        (("generate", "x", "--context", "0"), "--context is 0"),
        (("generate", "x", "--wait-for-boards", "-1"), "--wait-for-boards is -1"),
        (("plan", "--testbed", "nowhere"), "choose one of"),
        (("plan", "--testbed", "unequal", "--schedule", "fastest"), "schedule 'fastest' is not known"),
        (("demo", "--nodes", "0"), "--nodes is 0"),
        (("generate", "x", "--host", "0.0.0.0"), "no cluster key"),
        (("node", "--host", "203.0.113.7", "--insecure"), "cannot listen on 203.0.113.7"),
    ],
)
async def test_wrong_options(arguments: tuple[str, ...], text: str) -> None:
    assert_refused(await run(*arguments), text)


async def test_an_unknown_schedule_is_refused_with_the_known_ones() -> None:
    async with node_processes(1, DEMO_BUNDLE) as (cluster, _):
        result = await run("generate", "x", "--cluster", cluster, "--nodes", "1", "--schedule", "fastest")
        assert_refused(result, ", ".join(SCHEDULES))


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
async def test_a_node_ends_in_order(ending: signal.Signals) -> None:
    process = await start("node", "--cluster", f"ending-{secrets.token_hex(4)}", "--host", "127.0.0.1")
    async with asyncio.timeout(COMMAND_S):
        assert b"serves on 127.0.0.1" in await present(process.stdout).readline()
        process.send_signal(ending)
        _, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")


async def test_a_damaged_head_is_named_and_no_text_is_written(tmp_path: Path) -> None:
    damaged = shutil.copytree(DEMO_BUNDLE, tmp_path / "damaged")
    head = damaged / "head.onnx"
    data = bytearray(head.read_bytes())
    data[100_000:104_000] = bytes(byte ^ 1 for byte in data[100_000:104_000])
    head.write_bytes(data)
    async with node_processes(1, DEMO_BUNDLE) as (cluster, _):
        status, out, err = await run(
            *("generate", "def main(", "--bundle", str(damaged), "--cluster", cluster, "--nodes", "1", "--wait", "15")
        )
    assert_refused((status, out, err), "head.onnx: sha256 is", "damaged", "copy or export the bundle again")
    assert out == ""
