"""``python -m exporter.train_demo``: the demo model and its draft head, from the Python sources on this machine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from flowspec_edge.errors import FlowspecError

DESCRIPTION = """\
Train the demo target and its EAGLE-1 head from text on this machine: the standard library, pydoc's topics and the
sources of installed projects with permissive licences. What is held out stays out, and so do copies of it in other \
sources.

A run lives in one directory. Stop it when you like (Ctrl-C, or a kill): the same command goes on from the last
checkpoint and ends with the same model. The result stands in RUN/model, as flowspec-export takes it.
"""

EPILOG = """\
examples:
  python -m exporter.train_demo --run ./demo-run
  python -m exporter.train_demo --run ./demo-run --start-from exporter/demo_model --target-tokens 3
  python -m exporter.train_demo --evaluate exporter/demo_model

exit status: 0 done, 1 refused (the last line says why), 2 wrong arguments, 130 stopped with a checkpoint.
"""

STOPPED = 130
MILLION = 1_000_000


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m exporter.train_demo",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, metavar="RUN", help="directory of the run to begin or to go on with")
    what.add_argument("--evaluate", type=Path, metavar="MODEL", help="measure MODEL/target and MODEL/eagle instead")
    parser.add_argument(
        "--text",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="more Python sources, or a manual in reStructuredText; may be repeated",
    )
    parser.add_argument(
        "--start-from", type=Path, metavar="MODEL", help="begin with the weights of MODEL/target and MODEL/eagle"
    )
    parser.add_argument(
        "--target-tokens",
        type=float,
        default=10,
        metavar="MILLIONS",
        help="default: 10; 0 keeps the target of --start-from and trains its head alone",
    )
    parser.add_argument("--head-tokens", type=float, default=2.5, metavar="MILLIONS", help="default: 2.5")
    parser.add_argument(
        "--own-tokens",
        type=float,
        default=0.4,
        metavar="MILLIONS",
        help="of text that the target writes for its head; default: 0.4",
    )
    parser.add_argument("--target-peak", type=float, default=3e-3, metavar="RATE", help="highest learning rate")
    parser.add_argument("--head-peak", type=float, default=1e-3, metavar="RATE", help="highest learning rate")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes of one thread each; default: 2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="with --evaluate: the figures on stdout as JSON")
    parser.add_argument(
        "--no-compile", action="store_true", help="do without torch.compile, which needs a C++ compiler"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        return _evaluate(options) if options.evaluate else _train(options)
    except FlowspecError as error:
        print(f"train_demo: {error}", file=sys.stderr)
        return 1


def _train(options: argparse.Namespace) -> int:
    from exporter.training.curves import draw_curves
    from exporter.training.run import Settings, train

    settings = Settings(
        directory=options.run,
        extra_text=tuple(options.text),
        start_from=options.start_from,
        target_tokens=int(options.target_tokens * MILLION),
        head_tokens=int(options.head_tokens * MILLION),
        own_tokens=int(options.own_tokens * MILLION),
        target_peak=options.target_peak,
        head_peak=options.head_peak,
        num_workers=options.workers,
        seed=options.seed,
        is_compiled=not options.no_compile,
    )
    done = train(settings, lambda line: print(line, flush=True))
    (options.run / "curves.svg").write_text(draw_curves(options.run))
    return 0 if done else STOPPED


def _evaluate(options: argparse.Namespace) -> int:
    from exporter.training.evaluate import evaluate

    figures = evaluate(options.evaluate, lambda line: print(line, file=sys.stderr, flush=True))
    if options.json:
        print(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
