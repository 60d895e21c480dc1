"""Our copies of the published schedules, in the unit in which the originals were measured: tokens per stage time.

    python -m benchmarks.originals exporter/demo_model           each schedule on 15 prompts, about two minutes
    python -m benchmarks.originals CHECKPOINT_DIR --json         any other target/ with an EAGLE head in eagle/

A stage time is one pass of one stage over one chunk, however many rows that has. Hops, rows, head and drafter cost
nothing, so what counts is how many tokens the schedule's trees bring and how many stage times lie between them. The
ring has four stages, as the originals have. A prompt is the first 100 tokens of a file of Python 3.11's library that
the demo models were not trained on; the text is the target's likeliest.

Tokens are counted as the published code counts them: those after the first one, in whole verifications, until there are
more than 128. The stage times are those between the first token and the end of that verification. The figure of a
schedule is the sum of its tokens over the sum of its stage times. Each text is compared with the target's own.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

from flowspec_edge.bench.compare import check_text
from flowspec_edge.bench.remembered_drafts import RememberedDrafts
from flowspec_edge.bench.report import format_table
from flowspec_edge.bench.tape import TapeRecorder
from flowspec_edge.bench.testbed import StageCost, Testbed
from flowspec_edge.bench.virtual_clock import VirtualRing
from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core.limits import RECENT_ROWS
from flowspec_edge.core.speculation.drafting import DraftShape
from flowspec_edge.core.speculation.generation import TargetLimits
from flowspec_edge.core.speculation.schedules import SCHEDULES
from flowspec_edge.engine.drafters.eagle1 import Eagle1Drafter
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.tokenizer import Tokenizer

PROJECT = Path(__file__).resolve().parents[1]
PROMPT_FILES = (
    "asyncio/queues.py",
    "asyncio/unix_events.py",
    "dbm/__init__.py",
    "distutils/command/bdist_rpm.py",
    "distutils/command/build_scripts.py",
    "distutils/text_file.py",
    "encodings/johab.py",
    "encodings/oem.py",
    "importlib/resources/readers.py",
    "importlib/util.py",
    "lib2to3/fixes/fix_dict.py",
    "lib2to3/fixes/fix_getcwdu.py",
    "lib2to3/fixes/fix_renames.py",
    "netrc.py",
    "this.py",
)
PROMPT_TOKENS, NUM_TOKENS = 100, 128
NUM_WRITTEN = 1 + NUM_TOKENS + RECENT_ROWS
"""The text goes on beyond what counts, for the last verification that counts must not be cut short."""
STAGE_S = 1.0
ONE_PASS_A_SECOND = Testbed(
    name="stage-times",
    stages=(StageCost(fixed_ms=1000 * STAGE_S, row_ms=0, num_layers=1),) * 4,
    hop_ms=0,
    rate_mbit_per_s=math.inf,
    hidden_bytes=0,
    head_ms=0,
    draft_pass_ms=0,
    draft_row_ms=0,
)


def count(times_s: Sequence[float], num_tokens: int = NUM_TOKENS) -> tuple[int, float]:
    """Tokens after the first one and their seconds, of tokens that were final at ``times_s``: whole verifications up to
    the one that brings more than ``num_tokens``, or up to the end of a shorter text.
    """
    first_s, counted, last_s = times_s[0], 0, times_s[0]
    for time_s, together in itertools.groupby(times_s[1:]):
        if counted > num_tokens:
            break
        counted, last_s = counted + len(list(together)), time_s
    return counted, last_s - first_s


def measure(bundle: Bundle, prompts: Iterable[Sequence[int]], schedules: Sequence[str]) -> dict[str, float]:
    """Tokens per stage time of each schedule.

    Raises:
        LosslessError: a schedule wrote another text than the target.
    """
    directory, manifest = bundle.directory, bundle.manifest
    geometry = manifest.geometry
    limits = TargetLimits(geometry.max_context, geometry.vocab_size, frozenset(manifest.eos_token_ids))
    recorder = TapeRecorder(bundle)
    head = Head(directory, manifest)
    drafter = RememberedDrafts(Eagle1Drafter(directory, manifest, head, k=DraftShape().proposals))
    totals = {schedule: (0, 0.0) for schedule in schedules}
    for number, prompt in enumerate(prompts):
        tape = recorder.record(list(prompt), GenerateOptions(max_new_tokens=NUM_WRITTEN))
        drafter.forget()
        for schedule in schedules:
            options = GenerateOptions(max_new_tokens=NUM_WRITTEN, schedule=schedule)
            answer = VirtualRing(ONE_PASS_A_SECOND, tape, drafter, limits).generate(options)
            check_text(answer.tokens, tape.continuation, f"{schedule} on prompt {number}")
            tokens, seconds = count(answer.token_times_s)
            totals[schedule] = totals[schedule][0] + tokens, totals[schedule][1] + seconds
    return {schedule: tokens / (seconds / STAGE_S) for schedule, (tokens, seconds) in totals.items()}


def prompts_of(bundle: Bundle) -> list[list[int]]:
    """The first tokens of each file."""
    library = Path(sysconfig.get_path("stdlib"))
    if missing := [name for name in PROMPT_FILES if not (library / name).is_file()]:
        raise SystemExit(f"originals: {library} has no {missing[0]}; run it with CPython 3.11")
    tokenizer = Tokenizer(bundle.directory / bundle.manifest.tokenizer.file)
    return [tokenizer.encode((library / name).read_text(encoding="utf-8"))[:PROMPT_TOKENS] for name in PROMPT_FILES]


def export(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint's bundle in float32 with its draft head; exported where that has not been done yet."""
    digest = hashlib.sha256()
    for part in ("target", "eagle"):
        for path in sorted((checkpoint / part).iterdir()):
            digest.update(path.name.encode() + path.read_bytes())
    out = folder / digest.hexdigest()[:16]
    if not (out / "manifest.json").exists():
        print(f"exporting {checkpoint} ...", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "exporter", str(checkpoint / "target"), "--precision", "fp32"]
        command += ["--drafter", str(checkpoint / "eagle"), "--out", str(out), "--force"]
        subprocess.run(command, check=True, cwd=PROJECT, stdout=sys.stderr)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="directory with target/ and eagle/ as on the Hugging Face hub")
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES))
    parser.add_argument("--folder", type=Path, default=PROJECT / "build/originals", help="where bundles are kept")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    bundle = Bundle.load(export(options.checkpoint.resolve(), options.folder.resolve()))
    found = measure(bundle, prompts_of(bundle), options.schedules)
    if options.json:
        print(json.dumps({"tokens_per_stage_time": found}))
    else:
        print(
            format_table(["schedule", "tokens per stage time"], [[name, f"{rate:.3f}"] for name, rate in found.items()])
        )


if __name__ == "__main__":
    main()
