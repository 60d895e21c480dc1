"""Writes a bundle to a temporary directory, checks it against torch, and moves it into place only when it is whole."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.assembly import Assembly, Report
from exporter.drafter import load_draft_head
from exporter.model import load_checkpoint
from exporter.precisions import PRECISIONS
from flowspec_edge.errors import BundleError, CheckpointError, system_words
from flowspec_edge.manifest import MANIFEST_NAME, Manifest, load_manifest


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export, and where to.

    Attributes:
        checkpoint: directory of the target model.
        drafter: directory of its draft head; None where there is none.
        out: directory to write.
        precision: the bundle's own precision, of blocks, head and drafter; see :mod:`exporter.precisions`.
        also: further precisions of the blocks, among which devices may choose.
        eval_text: file with the text on which each precision's quality is measured; a page of source code when None.
        block_size: layers per ONNX file; a device serves whole files.
        name: what users see; the checkpoint directory's name when None.
        max_context: tokens of context to allow; the model's own limit when None.
        allow_pickle: read ``pytorch_model.bin`` where there are no safetensors.
        force: replace a bundle that is already at ``out``.
    """

    checkpoint: Path
    drafter: Path | None
    out: Path
    precision: str = "int8"
    also: tuple[str, ...] = ()
    eval_text: Path | None = None
    block_size: int = 1
    name: str | None = None
    max_context: int | None = None
    allow_pickle: bool = False
    force: bool = False


def export_bundle(options: ExportOptions, report: Report = lambda line: None) -> Manifest:
    """Export a checkpoint and its drafter as a bundle at ``options.out``.

    Raises:
        CheckpointError: the checkpoint or drafter cannot be exported.
        ParityError: a graph differs from torch by more than its tolerance.
        BundleError: ``options.out`` is taken or cannot be written.
    """
    began = time.monotonic()
    _check_out(options)
    eval_text = _read_text(options.eval_text) if options.eval_text is not None else None
    checkpoint = load_checkpoint(options.checkpoint, options.max_context, allow_pickle=options.allow_pickle)
    draft_head = None
    if options.drafter is not None:
        draft_head = load_draft_head(options.drafter, checkpoint.geometry, allow_pickle=options.allow_pickle)
    with _written_aside(options) as directory:
        precisions = dict.fromkeys((options.precision, *options.also))
        assembly = Assembly(checkpoint, directory, list(precisions), eval_text, report)
        name = options.name or checkpoint.directory.resolve().name
        manifest = assembly.assemble(name, options.block_size, draft_head)
        manifest.write(directory)
        load_manifest(directory)
    num_bytes = sum(entry.num_bytes for entry in manifest.files())
    report(f"{options.out}: {num_bytes / 1e6:.1f} MB in {time.monotonic() - began:.1f} s")
    return manifest


def _read_text(path: Path) -> tuple[str, str]:
    """The file's name and its text."""
    try:
        return path.name, path.read_text(encoding="utf-8")
    except (OSError, ValueError) as cause:
        raise CheckpointError(f"--eval-text {path}: not readable as UTF-8 text ({cause})") from cause


def _check_out(options: ExportOptions) -> None:
    out = options.out
    if options.block_size < 1:
        raise BundleError(f"--block-size is {options.block_size}; at least 1 layer goes into a file")
    for precision in (options.precision, *options.also):
        if precision not in PRECISIONS:
            raise BundleError(f"precision {precision!r} is not known; choose among {', '.join(PRECISIONS)}")
    if not out.parent.is_dir():
        raise BundleError(f"{out}: the directory {out.parent} does not exist; create it first")
    if not out.exists():
        return
    if not options.force:
        raise BundleError(f"{out}: exists already; choose another --out, or pass --force to replace it")
    if not (out / MANIFEST_NAME).is_file():
        raise BundleError(
            f"{out}: is not a bundle (no {MANIFEST_NAME}), so --force does not replace it; remove it yourself"
        )


@contextmanager
def _written_aside(options: ExportOptions) -> Iterator[Path]:
    """A directory beside ``out`` that takes the place of ``out`` at the end, or is deleted when anything fails."""
    out = options.out
    aside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".part"))
    try:
        yield aside
        os.chmod(aside, 0o755)  # mkdtemp lets only its owner in
        if out.exists():
            replaced = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".part"))
            out.rename(replaced / out.name)
            aside.rename(out)
            shutil.rmtree(replaced)
        else:
            aside.rename(out)
    except OSError as cause:
        raise BundleError(f"{out}: could not be written ({system_words(cause)})") from cause
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def bundle_report(manifest: Manifest) -> dict[str, Any]:
    """The parity report, the qualities and the size of a bundle as plain data, for ``--json``."""
    return {
        "name": manifest.name,
        "precision": manifest.precision,
        "num_bytes": sum(entry.num_bytes for entry in manifest.files()),
        "parity": vars(manifest.parity),
        "quality": [dataclasses.asdict(quality) for quality in manifest.quality],
        "made_with": manifest.made_with,
    }
