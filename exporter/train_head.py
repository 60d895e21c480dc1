"""``flowspec-train-head``: a draft head for a model that has none."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flowspec_edge.errors import CheckpointError, FlowspecError, system_words

if TYPE_CHECKING:
    from exporter.training.head_run import HeadRun

DESCRIPTION = """\
Train a draft head for a model as it is: the small network that guesses the model's next tokens, so that a ring of
boards verifies several at once. It changes no token of any text, only how soon they come.

The head learns from what the model itself answers to prompts that come along (explain, list, rewrite, code, JSON,
story), to prompts of yours (--prompts), or from text like that which the model will write (--text). Before it begins it
measures this machine and says how many hours it will take; while it runs it says how much of held-out text it guesses.

A run lives in a directory of its own. Stop it when you like (Ctrl-C, or a kill): the same command goes on from the last
checkpoint, and ends with the same head. The head fits all quantisations of the model, and no other model.
"""

EPILOG = """\
examples:
  flowspec-train-head ./smollm2-135m-instruct-q4_1.gguf --out ./smollm2-head
  flowspec-train-head Qwen/Qwen3-1.7B --out ./qwen3-head --answers 20000
  flowspec-train-head ./my-model --out ./my-head --text ./manual.txt ./letters.txt --answers 0
  flowspec-train-head ./my-model --evaluate ./my-head
  flowspec-export ./my-model --drafter ./my-head --out ./my-bundle

Hours: for a model of 135 million parameters, two cores take about half of one for 4000 answers and one to learn from
them; time grows with the model's size. A GPU is used where torch sees one.

exit status: 0 done, 1 refused (the last line says why), 2 wrong arguments, 130 stopped with a checkpoint.
"""

STOPPED = 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowspec-train-head",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="GGUF file, directory of a checkpoint, or a name on the Hugging Face hub, as flowspec-export takes them",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, metavar="HEAD", help="directory of the head to make; must not exist")
    what.add_argument("--evaluate", type=Path, metavar="HEAD", help="measure a head: tokens per tree of 60 drafts")
    parser.add_argument("--run", type=Path, metavar="RUN", help="directory of the run; default: HEAD.run")
    parser.add_argument(
        "--text", type=Path, nargs="+", default=[], metavar="FILE", help="learn from this UTF-8 text as well"
    )
    parser.add_argument(
        "--prompts", type=Path, nargs="+", default=[], metavar="FILE", help="prompts to answer, one a line"
    )
    parser.add_argument("--answers", type=int, default=4000, metavar="N", help="the model writes; default: 4000")
    parser.add_argument("--rows", type=int, default=320, metavar="TOKENS", help="of a text at most; default: 320")
    parser.add_argument("--epochs", type=float, default=6.0, metavar="N", help="through all texts; default: 6")
    parser.add_argument(
        "--draft-vocab",
        type=int,
        metavar="TOKENS",
        help="the most frequent tokens, which alone are drafted; default: a quarter of the model's, at least 8192",
    )
    parser.add_argument(
        "--draft-steps", type=int, default=4, metavar="N", help="drafts in a row that it learns to make; default: 4"
    )
    parser.add_argument("--start-from", type=Path, metavar="HEAD", help="begin with the weights of this head")
    parser.add_argument("--peak", type=float, default=1e-3, metavar="RATE", help="highest learning rate")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes of one thread; default: one per core, and one with a GPU"
    )
    parser.add_argument("--device", metavar="NAME", help="as torch has it; default: cuda where there is one, or cpu")
    parser.add_argument("--prompts-evaluated", type=int, default=60, metavar="N", help="of --evaluate; default: 60")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="with --evaluate: the figures on stdout as JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill says how to go on, as Ctrl-C does
    try:
        return _run(options)
    except FlowspecError as error:
        report(f"flowspec-train-head: {error}")
        return 1
    except ImportError as cause:
        report(
            f"flowspec-train-head: training needs {cause.name}, which is not installed; run pip install "
            "'flowspec-edge[train]'"
        )
        return 1
    except KeyboardInterrupt:
        _say_how_to_go_on()
        return STOPPED


def _run(options: argparse.Namespace) -> int:
    run = _head_run(options)
    from exporter.training.head_run import evaluate_head, train_head  # torch takes seconds to import, --help should not

    if options.evaluate:
        figures = evaluate_head(run, options.evaluate, options.prompts_evaluated, report)
        if options.json:
            print(json.dumps(figures, indent=1))
        return 0
    if options.out.exists():
        raise CheckpointError(f"{options.out}: exists already; choose another --out, or remove it yourself")
    if not train_head(run, report):
        _say_how_to_go_on()
        return STOPPED
    try:
        shutil.copytree(run.head_directory, options.out)
    except OSError as cause:
        raise CheckpointError(f"{options.out}: could not be written ({system_words(cause)})") from cause
    num_bytes = sum(path.stat().st_size for path in options.out.iterdir())
    report(
        f"{options.out}: done, {num_bytes / 1e6:.1f} MB in float16; now flowspec-export {options.model} --drafter "
        f"{options.out} --out BUNDLE"
    )
    return 0


def _head_run(options: argparse.Namespace) -> HeadRun:
    import torch

    from exporter.hub import find_model
    from exporter.training.head_run import HeadRun
    from exporter.training.head_training import HeadSettings

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu":
        torch.set_float32_matmul_precision("high")
    head = options.out or options.evaluate
    return HeadRun(
        model=find_model(options.model),
        directory=options.run or head.with_name(f"{head.name}.run"),
        name=Path(options.model.rpartition(":")[2]).name.removesuffix(".gguf"),
        text=tuple(options.text),
        prompts=tuple(options.prompts),
        num_answers=options.answers,
        rows=options.rows,
        epochs=options.epochs,
        draft_vocab=options.draft_vocab,
        start_from=options.start_from,
        num_workers=(options.workers or len(os.sched_getaffinity(0))) if device == "cpu" else 1,
        device=device,
        head=HeadSettings(peak=options.peak, draft_steps=options.draft_steps, seed=options.seed, most_measured=48),
    )


def report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _say_how_to_go_on() -> None:
    report("flowspec-train-head: stopped; the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
