"""``flowspec-export``: a GGUF file, or a checkpoint and its drafter, in; a bundle out."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowspec_edge.errors import FlowspecError

DESCRIPTION = """\
Turn a GGUF file, or a Hugging Face checkpoint and the EAGLE-1 or EAGLE-3 draft head trained for it, into a bundle: the
directory that `flowspec node` serves. The bundle is cut by layers, so that each board loads only its own.

Every exported file is compared with the same arithmetic in numpy, on real text, before the bundle appears; the
differences are kept in its manifest.json. A bundle that differs by more than the stated tolerance is not written. GGUF
files need no torch, nor do EAGLE-1 heads in float16 or float32, as flowspec-train-head writes them.
"""

EPILOG = """\
examples:
  flowspec-export ./tinyllama --drafter ./tinyllama-eagle --out ./tinyllama-w8a8
  flowspec-export ./tinyllama --out ./tinyllama-fp32 --precision fp32 --block-size 2 --drafter none
  flowspec-export ./qwen3-1.7b-q4_k_m.gguf --out ./qwen3-own
  flowspec-export Qwen/Qwen3-1.7B --out ./qwen3 --also q8 int4 --eval-text ./prose.txt

exit status: 0 written, 1 refused (the last line says why), 2 wrong arguments, 130 interrupted.
"""

PRECISIONS = ("own", "fp32", "fp16", "int8", "q8", "w8a8", "int4")
NO_DRAFTER = "none"
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowspec-export",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint",
        metavar="MODEL",
        help="directory with config.json, tokenizer.json (or tokenizer.model) and safetensors of a Llama, TinyLlama, "
        "SmolLM, Vicuna, Mistral, Qwen2 or 3, Gemma 2 or 3, Phi-3 or 4, Granite or OLMo 2 model, or a GGUF file of "
        "one; or its name on the Hugging Face hub, ORG/REPO or ORG/REPO:file.gguf (HF_HOME, HF_TOKEN and "
        "HF_HUB_OFFLINE are heeded)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="directory to write; must not exist")
    parser.add_argument(
        "--drafter",
        metavar="EAGLE",
        help="directory, or name on the hub, of an EAGLE-1 or EAGLE-3 head for this very model; none for drafts from "
        "the context alone (default: the head that comes along for this model, where there is one)",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="of the whole bundle. own (default of GGUF files, and of GPTQ and AWQ checkpoints): every weight exactly "
        "as the file has it. w8a8 (default of other checkpoints): 8-bit weights and activations of 8 bits per token, "
        "the fastest for chunks. q8: both in blocks of 32, nearer to the model and slower. int4: 4-bit weights, the "
        "smallest. int8: 8-bit weights in the files, unpacked to float32 when loaded. fp16: matrices of 16 bits. fp32: "
        "the checkpoint's weights as they are",
    )
    parser.add_argument(
        "--also",
        nargs="+",
        default=[],
        choices=PRECISIONS,
        metavar="PRECISION",
        help="further precisions of the layers, among which each board may choose (flowspec node --precision)",
    )
    parser.add_argument(
        "--eval-text",
        type=Path,
        metavar="FILE",
        help="UTF-8 text to tell each precision's quality on: error, greedy agreement, perplexity (its first 2048 "
        "tokens; default: built-in prose and code, and nothing for a model's own precision alone)",
    )
    parser.add_argument(
        "--max-loss",
        type=float,
        default=3.0,
        metavar="PERCENT",
        help="leave a precision out whose perplexity on that text is larger than float32's by more than this "
        "(default 3)",
    )
    parser.add_argument(
        "--block-size",
        type=int,
        default=1,
        metavar="LAYERS",
        help="layers per file; 1 lets the planner cut anywhere (default)",
    )
    parser.add_argument("--name", help="name shown to users; the checkpoint's name by default")
    parser.add_argument(
        "--max-context",
        type=int,
        metavar="TOKENS",
        help="longest prompt and output together (default: the model's own limit; within the trained context of a "
        "longrope model, its short factors are taken)",
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read pytorch_model.bin where there are no safetensors, with torch's weights_only",
    )
    parser.add_argument("--force", action="store_true", help="replace the bundle that is already at --out")
    parser.add_argument("--json", action="store_true", help="print the parity report on stdout as JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what lies half written is removed, as by Ctrl-C
    try:
        _export(options)
    except FlowspecError as error:
        if options.json:
            print(json.dumps({"error": {"type": type(error).__name__, "message": str(error)}}))
        print(f"flowspec-export: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("flowspec-export: interrupted, nothing was written", file=sys.stderr)
        return INTERRUPTED
    return 0


def _export(options: argparse.Namespace) -> None:
    try:  # ONNX Runtime and torch take seconds to import, --help should not
        report = _run(options)
    except ImportError as cause:
        raise FlowspecError(
            f"exporting needs {cause.name}, which is not installed; run pip install 'flowspec-edge[export]', or "
            "'flowspec-edge[gguf]' for GGUF files"
        ) from cause
    if options.json:
        print(json.dumps(report, indent=1))


def _run(options: argparse.Namespace) -> dict[str, Any]:
    from exporter.bundle import ExportOptions, bundle_report, export_bundle
    from exporter.hub import find_draft_head, find_model
    from exporter.known_heads import HEADS

    has_drafter = options.drafter not in (None, NO_DRAFTER)
    manifest = export_bundle(
        ExportOptions(
            checkpoint=find_model(options.checkpoint, allow_pickle=options.allow_pickle),
            drafter=find_draft_head(options.drafter, allow_pickle=options.allow_pickle) if has_drafter else None,
            heads=None if options.drafter == NO_DRAFTER else HEADS,
            out=options.out,
            precision=options.precision,
            also=tuple(options.also),
            eval_text=options.eval_text,
            max_loss=options.max_loss / 100,
            block_size=options.block_size,
            name=options.name or Path(options.checkpoint.rpartition(":")[2]).resolve().name.removesuffix(".gguf"),
            max_context=options.max_context,
            allow_pickle=options.allow_pickle,
            force=options.force,
        ),
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    return bundle_report(manifest)


if __name__ == "__main__":
    sys.exit(main())
