"""Two emulated ARM boards and this machine form a ring, and write what the ring without them writes.

    make arm-check                       everything, in build/arm
    make arm-check ARGS=--quick          one text for each precision instead of four

The boards run Debian's Python and the published aarch64 wheels under qemu-user, one as a Raspberry Pi 5 (Cortex-A76),
one as a Raspberry Pi 4 (Cortex-A72). This machine originates and serves no layers, so every layer's weights are fetched
by a board. Kernels differ between processors, and so may the last bits of a logit. Where a text differs, the check
finds the first token that differs and how far apart the two choices are; it fails where that is more than a near tie.
On one board a row must have the same bits in every tree, in every precision. Each board also makes a bundle of a GGUF
file, in which all graphs must have the bytes of those that this machine makes of it, and the ring writes from one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flowspec_edge.bench.tape import TapeRecorder
from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core.speculation.verify import Sampler, noise_of
from flowspec_edge.engine.tokenizer import Tokenizer
from tests.arm.userland import BOARDS, PROJECT, ArmCheckError, Report, Userland, run

PROMPT = 'class Stack:\n    """A last-in, first-out container."""\n\n    def __init__(self, items=()):\n'
NUM_TOKENS = 48
NEAR_TIE = 0.2
"""Nats between two choices whose order rounding may change.

In w8a8 an activation near the middle between two 8-bit values may fall on either. Embedded rows that differ by 1e-6, on
one processor, move the two likeliest tokens of this text by 0.04 nats at the median and 0.2 at most (48 tokens, 12
draws).
"""
MAX_GAP = 64.0
"""Nats: a larger gap is not looked for."""
START_S = 120.0
"""An emulated node needs ten seconds for its imports."""
GENERATE_S = 300.0


@dataclass(frozen=True)
class Case:
    precision: str
    schedule: str
    temperature: float

    def __str__(self) -> str:
        return f"{self.precision}, {self.schedule}, temperature {self.temperature:g}"


@dataclass(frozen=True)
class Text:
    """What a ring wrote. ``fetched_bytes`` counts the weights that its nodes did not have before."""

    tokens: list[int]
    fetched_bytes: int


@dataclass(frozen=True)
class Finding:
    """One text on both rings.

    ``gap`` is the nats between the choices at the first token that differs; None where all are equal.
    """

    case: Case
    num_tokens: int
    num_equal: int
    gap: float | None
    fetched_bytes: int
    seconds: float

    @property
    def passed(self) -> bool:
        return self.gap is None or self.gap <= NEAR_TIE

    def __str__(self) -> str:
        fetched = f", {self.fetched_bytes / 1e6:.1f} MB fetched" if self.fetched_bytes else ""
        if self.gap is None:
            found = f"all {self.num_tokens} tokens equal"
        else:
            kind = "a near tie" if self.passed else f"more than a near tie of {NEAR_TIE} nats"
            found = f"token {self.num_equal + 1} of {self.num_tokens} differs, {self.gap:.4f} nats apart: {kind}"
        return f"{self.case}: {found} ({self.seconds:.1f} s{fetched})"


@dataclass(frozen=True)
class BitsOfRows:
    """Rows of random trees, and how many of them have other bits than by themselves. There should be none, and not
    because rows run one by one.
    """

    board: str
    what: str
    compared: int
    differing: int
    one_by_one: bool

    def __str__(self) -> str:
        found = f"{self.what} on {self.board}: {self.differing} of {self.compared} rows have other bits in a tree"
        return found + (", but they run one by one" if self.one_by_one else "")

    @property
    def passed(self) -> bool:
        return not self.differing and not self.one_by_one


class Ring:
    """Two node processes, and this machine that asks them."""

    def __init__(self, cluster: str, ports: Sequence[int], bundle: Path, home: Path) -> None:
        self.cluster, self.ports, self.bundle, self.home = cluster, ports, bundle, home

    async def generate(self, case: Case) -> Text:
        """Have the ring write one text.

        Raises:
            ArmCheckError: there is no text; the last line that the origin wrote says why.
        """
        peers = [word for port in self.ports for word in ("--peer", f"127.0.0.1:{port}")]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "flowspec_edge", "generate", "--json", "--cluster", self.cluster, *peers),
            *("--host", "127.0.0.1", "--nodes", str(len(self.ports)), "--wait", "60", "--equal-split"),
            *("--bundle", str(self.bundle), "--schedule", case.schedule, "--temperature", str(case.temperature)),
            *("--max-new-tokens", str(NUM_TOKENS), PROMPT),
            cwd=PROJECT,
            env={**os.environ, "FLOWSPEC_HOME": str(self.home)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(GENERATE_S):
                said, errors = await process.communicate()
        except TimeoutError as cause:
            raise ArmCheckError(f"{case}: no text within {GENERATE_S:g} s") from cause
        finally:
            await _end(process)
        if process.returncode != 0:
            raise ArmCheckError(f"{case}: {_last_line(errors)}")
        report = json.loads(said)
        stages = report["ring"]
        if len(stages) != len(self.ports):
            raise ArmCheckError(f"{case}: {len(stages)} of {len(self.ports)} nodes served layers")
        return Text(report["token_ids"], sum(stage["fetched_bytes"] for stage in stages))


@contextlib.asynccontextmanager
async def open_ring(commands: Sequence[tuple[Sequence[str], str | None]], bundle: Path) -> AsyncIterator[Ring]:
    """Start nodes by the commands that run Python there, and end them in any case. With each command comes the name of
    the board that the node must recognise.
    """
    cluster = f"arm-check-{secrets.token_hex(4)}"
    async with contextlib.AsyncExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flowspec-arm-")))
        starts = [
            _start_node(command, board, f"{cluster}-{number}", cluster, home / str(number))
            for number, (command, board) in enumerate(commands)
        ]
        started = await asyncio.gather(*starts, return_exceptions=True)
        nodes = [node for node in started if not isinstance(node, BaseException)]
        for process, _ in nodes:
            stack.push_async_callback(_end, process)
        for node in started:
            if isinstance(node, BaseException):
                raise node
        yield Ring(cluster, [port for _, port in nodes], bundle, home)


async def _start_node(
    command: Sequence[str], board: str | None, name: str, cluster: str, home: Path
) -> tuple[asyncio.subprocess.Process, int]:
    """Start a node, and return its process and port once it serves."""
    await asyncio.to_thread(home.mkdir)
    process = await asyncio.create_subprocess_exec(
        *(*command, "-m", "flowspec_edge", "node", "--name", name, "--cluster", cluster, "--host", "127.0.0.1"),
        *("--threads", "1", "--memory", "1024", "--json", "--until-stdin-closes"),
        cwd=PROJECT,
        env={**os.environ, "FLOWSPEC_HOME": str(home)},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=(home / "errors").open("wb"),
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(START_S):
            line = await process.stdout.readline()
        if not line:
            raise ArmCheckError(f"node {name}: ended at its start: {_last_line((home / 'errors').read_bytes())}")
        said = json.loads(line)
        if board is not None and said["board"] != board:
            raise ArmCheckError(f"node {name}: takes itself for {said['board']}, not {board}")
    except BaseException as cause:
        await _end(process)
        if isinstance(cause, TimeoutError):
            raise ArmCheckError(f"node {name}: does not serve after {START_S:g} s") from cause
        raise
    return process, said["port"]


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.stdin is not None:
        process.stdin.close()  # asks it to end in order
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(10):
                await process.wait()
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()


def _last_line(errors: bytes) -> str:
    return (errors.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]


def compare(case: Case, here: Text, there: Text, bundle: Bundle, seconds: float) -> Finding:
    """Find the first token at which the texts differ, and how close that decision was."""
    pairs = zip(here.tokens, there.tokens, strict=False)
    num_equal = next((index for index, (one, other) in enumerate(pairs) if one != other), len(there.tokens))
    gap = None
    if here.tokens != there.tokens:
        is_cut = num_equal == len(there.tokens)
        gap = MAX_GAP if is_cut else find_gap(case, bundle, num_equal, there.tokens[num_equal])
    return Finding(case, len(here.tokens), num_equal, gap, there.fetched_bytes, seconds)


def find_gap(case: Case, bundle: Bundle, index: int, token: int) -> float:
    """By how many nats the logit of ``token`` would have to grow for it to be drawn here at ``index`` of the text."""
    options = GenerateOptions(max_new_tokens=NUM_TOKENS, temperature=case.temperature)
    prompt = Tokenizer(bundle.directory / bundle.manifest.tokenizer.file).encode(PROMPT)
    tape = TapeRecorder(bundle).record(prompt, options)
    position = len(prompt) + index
    logits = tape.logits[position - 1].copy()
    sampler = Sampler(options, noise_of(len(logits)))
    low, high, own = 0.0, MAX_GAP, logits[token]
    for _ in range(20):
        middle = (low + high) / 2
        logits[token] = own + middle
        low, high = (low, middle) if sampler.draw(logits, position) == token else (middle, high)
    return high


def bundles_to_check(userland: Userland, report: Report) -> Iterator[Bundle]:
    """The demo model as it is shipped; where the exporter can run, exported to w8a8 and the other precisions; and as
    the boards make it of a GGUF file.
    """
    yield Bundle.load(DEMO_BUNDLE)
    try:
        import torch  # noqa: F401
    except ImportError:
        report("torch is not installed here: nothing is exported, only the shipped precision is checked")
        return
    yield _exported(userland.folder / "demo-w8a8", report)
    yield _converted(userland, report)


def _exported(target: Path, report: Report) -> Bundle:
    from exporter.precisions import OWN, PRECISIONS

    report("exporting the demo model to w8a8 and the other precisions ...")
    model = PROJECT / "exporter/demo_model"
    command = [sys.executable, "-m", "exporter", str(model / "target"), "--drafter", str(model / "eagle")]
    others = sorted(PRECISIONS.keys() - {OWN, "w8a8", Bundle.load(DEMO_BUNDLE).manifest.precision})
    command += ["--precision", "w8a8", "--also", *others, "--max-loss", "100"]
    run(
        [*command, "--out", str(target), "--force"],
        "the demo model cannot be exported",
        cwd=PROJECT,
    )
    return Bundle.load(target)


def _converted(userland: Userland, report: Report) -> Bundle:
    """The bundle that one of the boards makes of the demo model as a GGUF file.

    Raises:
        ArmCheckError: a board cannot make one, or makes another than this machine.
    """
    from tests.exporter.gguf.demo_model import write_demo_gguf

    model, here = write_demo_gguf(userland.folder / "demo.gguf"), userland.folder / "demo-gguf"
    command = [sys.executable, "-m", "exporter", str(model), "--out", str(here), "--force"]
    run(command, "the GGUF file cannot be exported", cwd=PROJECT)
    expected = {entry.file: entry.sha256 for entry in Bundle.load(here).manifest.files()}
    for board in BOARDS:
        began, there = time.monotonic(), userland.folder / f"demo-gguf-{board.name}"
        userland.convert(board, model, there)
        bundle = Bundle.load(there)
        found = {entry.file: entry.sha256 for entry in bundle.manifest.files()}
        if others := sorted(file for file in expected.keys() | found.keys() if found.get(file) != expected.get(file)):
            raise ArmCheckError(
                f"{board.name}: makes other files of {model.name} than this machine: {', '.join(others)}"
            )
        took = time.monotonic() - began
        report(f"{model.name} on {board.name}: becomes the bundle that this machine makes of it ({took:.1f} s)")
    return bundle


async def check(folder: Path, is_quick: bool, report: Report) -> dict[str, Any]:
    """Make the whole check, and return what was found as JSON."""
    began = time.monotonic()
    userland = Userland(folder)
    userland.prepare(report)
    boards = {board.name: userland.versions(board) for board in BOARDS}
    for name, versions in boards.items():
        report(
            f"{name}: "
            + ", ".join(f"{what} {version}" for what, version in versions.items())
            + "; no torch, no compiler"
        )
    findings, bits = [], []
    for bundle in bundles_to_check(userland, report):
        for board in BOARDS:
            for what, counts in userland.rows_that_differ(board, bundle.directory).items():
                bits.append(BitsOfRows(board.name, what, **counts))
                report(str(bits[-1]))
        cases = [
            Case(bundle.manifest.precision, schedule, temperature)
            for schedule in ("flowspec", "autoregressive")
            for temperature in (0.0, 0.6)
        ]
        async for finding in _compare_rings(userland, bundle, cases[:1] if is_quick else cases):
            findings.append(finding)
            report(str(finding))
    return {
        "boards": boards,
        "texts": [{**asdict(finding), "passed": finding.passed} for finding in findings],
        "bits_of_rows": [asdict(row_bits) for row_bits in bits],
        "passed": all(finding.passed for finding in findings) and all(row_bits.passed for row_bits in bits),
        "seconds": round(time.monotonic() - began, 1),
    }


async def _compare_rings(userland: Userland, bundle: Bundle, cases: Sequence[Case]) -> AsyncIterator[Finding]:
    async with open_ring([([sys.executable], None)] * len(BOARDS), bundle.directory) as ring:
        expected = [await ring.generate(case) for case in cases]
    async with open_ring([(userland.command(board), board.name) for board in BOARDS], bundle.directory) as ring:
        for case, here in zip(cases, expected, strict=True):
            began = time.monotonic()
            there = await ring.generate(case)
            yield compare(case, here, there, bundle, time.monotonic() - began)


def main() -> int:
    description, _, _ = (__doc__ or "").partition("\n\n    make")
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--folder", type=Path, default=PROJECT / "build/arm", help="kept between checks (default: build/arm)"
    )
    parser.add_argument("--quick", action="store_true", help="one text for each precision")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()

    def report(line: str) -> None:
        print(line, file=sys.stderr if options.json else sys.stdout, flush=True)

    try:
        found = asyncio.run(check(options.folder.resolve(), options.quick, report))
    except ArmCheckError as error:
        print(f"arm-check: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("arm-check: interrupted", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps(found))
    else:
        print(f"{'passed' if found['passed'] else 'FAILED'} in {found['seconds']:.0f} s")
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
