"""Writes a bundle to a temporary directory, compares its graphs with what they must compute, and moves it into place
only when it is whole.
"""

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

from exporter import built_in
from exporter.assembly import Assembly, Draft
from exporter.known_heads import HEADS, damaged_head, find_known_head
from exporter.precisions import OWN, PRECISIONS
from exporter.quality import Evaluation
from exporter.source import Report, Source
from flowspec_edge.errors import BundleError, CheckpointError, system_words
from flowspec_edge.manifest import MANIFEST_NAME, Manifest, load_manifest


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export, and where to.

    Attributes:
        checkpoint: directory of the target model, or a GGUF file.
        drafter: directory of its draft head; None: the one that comes along for this very model, where there is one.
        heads: directory of the heads that come along; None: none of them is taken.
        out: directory to write.
        precision: the bundle's own precision, of blocks, head and drafter; see :mod:`exporter.precisions`. None: the
            model's own where it is quantised already, as in a GGUF file, and else w8a8.
        also: further precisions of the blocks, among which devices may choose.
        eval_text: file with the text on which each precision's quality is measured. None: built-in prose and code, or
            nothing for a model in its own precision alone.
        max_loss: a precision whose perplexity is larger than float32's by a greater share than this is left out.
        block_size: layers per ONNX file; a device serves whole files.
        name: what users see; the checkpoint directory's name when None.
        max_context: tokens of context to allow; the model's own limit when None.
        allow_pickle: read ``pytorch_model.bin`` where there are no safetensors.
        force: replace a bundle that is already at ``out``.
    """

    checkpoint: Path
    drafter: Path | None
    out: Path
    heads: Path | None = HEADS
    precision: str | None = None
    also: tuple[str, ...] = ()
    eval_text: Path | None = None
    max_loss: float = 0.03
    block_size: int = 1
    name: str | None = None
    max_context: int | None = None
    allow_pickle: bool = False
    force: bool = False


def export_bundle(options: ExportOptions, report: Report = lambda line: None) -> Manifest:
    """Export a checkpoint and its drafter as a bundle at ``options.out``.

    Raises:
        CheckpointError: the checkpoint or drafter cannot be exported.
        ParityError: a graph differs from what it must compute by more than its tolerance.
        BundleError: ``options.out`` is taken or cannot be written.
    """
    began = time.monotonic()
    _check_out(options)
    source = _open_source(options)
    draft = _open_draft(options, source, report)
    precisions = _precisions(options, source)
    evaluation = _evaluation(options, precisions)
    for note in source.notes():
        report(note)
    _check_room(options, source, precisions)
    with _written_aside(options) as directory:
        assembly = Assembly(source, directory, precisions, evaluation, report)
        name = options.name or options.checkpoint.resolve().name.removesuffix(".gguf")
        manifest = assembly.assemble(name, options.block_size, draft)
        manifest.write(directory)
        load_manifest(directory)
    num_bytes = sum(entry.num_bytes for entry in manifest.files())
    report(f"{options.out}: {num_bytes / 1e6:.1f} MB in {time.monotonic() - began:.1f} s")
    return manifest


def _open_source(options: ExportOptions) -> Source:
    """The model. What is read by torch is imported only where there is such a thing."""
    if options.checkpoint.is_file():
        from exporter.gguf.model import open_gguf

        return open_gguf(options.checkpoint, options.max_context)
    from exporter.model import load_checkpoint

    return load_checkpoint(options.checkpoint, options.max_context, allow_pickle=options.allow_pickle)


def _open_draft(options: ExportOptions, source: Source, report: Report) -> Draft | None:
    """The draft head that was asked for, or that comes along."""
    directory = options.drafter
    if directory is None:
        return None if options.heads is None else _open_known_draft(source, options.heads, report)
    from exporter.drafter import open_draft

    try:
        return open_draft(directory, source, allow_pickle=options.allow_pickle)
    except ImportError as cause:
        raise CheckpointError(
            f"{directory}: a draft head of this kind is exported by torch, but {cause.name} is not installed; run "
            "pip install 'flowspec-edge[export]', or leave --drafter out"
        ) from cause


def _open_known_draft(source: Source, heads: Path, report: Report) -> Draft | None:
    directory = find_known_head(source, heads)
    if directory is None:
        return None
    from exporter.drafter import open_draft

    try:
        draft = open_draft(directory, source)
    except CheckpointError as cause:
        raise damaged_head(directory, cause) from cause
    report(f"note: drafts by {directory.name}, a head that comes along; flowspec-export --drafter none leaves it out")
    return draft


def _precisions(options: ExportOptions, source: Source) -> list[str]:
    """Those that the bundle is to have, its own first."""
    precisions = list(dict.fromkeys((options.precision or (OWN if source.own_bytes else "w8a8"), *options.also)))
    if OWN in precisions and not source.own_bytes:
        raise BundleError(
            f"precision {OWN} is that of quantised models, as of GGUF files; {options.checkpoint} is none: choose fp32"
        )
    return precisions


def _evaluation(options: ExportOptions, precisions: list[str]) -> Evaluation | None:
    """What qualities are measured on, if they are."""
    path = options.eval_text
    if path is None:
        if precisions == [OWN]:
            return None
        return Evaluation(built_in.NAME, built_in.measured_texts(), options.max_loss)
    try:
        return Evaluation(path.name, [path.read_text(encoding="utf-8")], options.max_loss)
    except (OSError, ValueError) as cause:
        raise CheckpointError(f"--eval-text {path}: not readable as UTF-8 text ({cause})") from cause


def _check_out(options: ExportOptions) -> None:
    out = options.out
    if options.block_size < 1:
        raise BundleError(f"--block-size is {options.block_size}; at least 1 layer goes into a file")
    for precision in (options.precision, *options.also):
        if precision is not None and precision not in PRECISIONS:
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


def _check_room(options: ExportOptions, source: Source, precisions: list[str]) -> None:
    """Raise BundleError where it is plain before that the disk is too small."""
    if precisions[0] != OWN:
        return
    free = shutil.disk_usage(options.out.parent).free
    if free < source.own_bytes:
        raise BundleError(
            f"{options.out}: the bundle takes about {source.own_bytes / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free "
            "on that disk; make room there, or choose another place"
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
