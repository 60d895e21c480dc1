"""Assembles a bundle aside, checks it against torch, and puts it in place only when it is whole."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from exporter.drafter import DraftHead, load_draft_head
from exporter.eagle3 import Eagle3Head
from exporter.model import Checkpoint, load_checkpoint
from exporter.onnx_export import GraphSpec, block_spec, export_graph, final_norm_spec, fuse_spec, head_spec, top_spec
from exporter.parity import PROBE_TEXT, ChainCheck, probe_steps
from exporter.quantize import BITS, quantize_graph
from exporter.stage_module import build_block, build_final_norm, build_head
from flowspec_edge.errors import BundleError, CheckpointError
from flowspec_edge.manifest import (
    MANIFEST_NAME,
    BlockEntry,
    DrafterEntry,
    FileEntry,
    Manifest,
    Parity,
    describe_file,
    load_manifest,
)

TOLERANCE = 1e-4
"""Largest error allowed, relative to the rows' RMS (see manifest.Parity). Float32 sums differ in their order alone: the demo
model's whole chain is at 6e-6."""
REFERENCES = {
    "fp32": "the checkpoint's weights in float32",
    "int8": f"the dequantised {BITS}-bit weights in float32",
}
MADE_WITH = ("flowspec-edge", "torch", "optimum", "optimum-onnx", "transformers", "onnx", "onnxruntime")

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export, and where to.

    Attributes:
        precision: ``fp32``, or ``int8`` for 8-bit weights in the files; see :mod:`exporter.quantize`.
        block_size: layers per ONNX file; a device serves whole files.
        max_context: tokens of context to allow; the model's own limit when None.
        allow_pickle: read ``pytorch_model.bin`` where there are no safetensors.
        force: replace a bundle that is already at ``out``.
    """

    checkpoint: Path
    drafter: Path | None
    out: Path
    precision: str = "int8"
    block_size: int = 1
    name: str | None = None
    max_context: int | None = None
    allow_pickle: bool = False
    force: bool = False


def export_bundle(options: ExportOptions, say: Say = lambda line: None) -> Manifest:
    """Export a checkpoint and its drafter as a bundle at ``options.out``.

    Raises:
        CheckpointError: the checkpoint or drafter cannot be exported.
        ParityError: a graph differs from torch by more than its tolerance.
        BundleError: ``options.out`` is taken or cannot be written.
    """
    began = time.monotonic()
    _check_out(options)
    checkpoint = load_checkpoint(options.checkpoint, options.max_context, allow_pickle=options.allow_pickle)
    draft_head = None
    if options.drafter is not None:
        draft_head = load_draft_head(options.drafter, checkpoint.geometry, allow_pickle=options.allow_pickle)
    with _written_aside(options) as directory:
        manifest = _Assembly(options, checkpoint, directory, say).assemble(draft_head)
        manifest.write(directory)
        load_manifest(directory)
    num_bytes = sum(entry.num_bytes for entry in manifest.files())
    say(f"{options.out}: {num_bytes / 1e6:.1f} MB in {time.monotonic() - began:.1f} s")
    return manifest


class _Assembly:
    """One export under way: each part is written, quantised where asked, compared with torch, and let go of."""

    def __init__(self, options: ExportOptions, checkpoint: Checkpoint, directory: Path, say: Say) -> None:
        self.options, self.checkpoint, self.directory, self.say = options, checkpoint, directory, say
        self.embedding = _exact_table(checkpoint.embedding())
        token_ids = _probe_tokens(checkpoint)
        self.check = ChainCheck(probe_steps(token_ids, checkpoint.geometry.max_context), self.embedding, TOLERANCE)

    def assemble(self, draft_head: DraftHead | Eagle3Head | None) -> Manifest:
        checkpoint, check = self.checkpoint, self.check
        shutil.copyfile(checkpoint.tokenizer_path, self.directory / "tokenizer.json")
        np.save(self.directory / "embedding.npy", self.embedding)
        blocks = list(self._blocks(draft_head.taps if draft_head else ()))
        final_norm, chain_error = self._final_norm()
        head, head_error = self._head()
        drafter, drafter_error = self._drafter(draft_head) if draft_head else (None, None)
        if drafter is None:
            self.say("no draft head: drafts come from repetitions in the text alone")
        parity = Parity(
            tolerance=check.tolerance,
            chain_error=chain_error,
            block_errors=check.block_errors,
            head_error=head_error,
            drafter_error=drafter_error,
            reference=REFERENCES[self.options.precision],
            num_rows=check.num_rows,
        )
        return Manifest(
            name=self.options.name or checkpoint.directory.resolve().name,
            architecture=checkpoint.architecture,
            precision=self.options.precision,
            geometry=checkpoint.geometry,
            bos_token_id=checkpoint.bos_token_id,
            eos_token_ids=checkpoint.eos_token_ids,
            chat_template=checkpoint.chat_template,
            tokenizer=self._entry("tokenizer.json"),
            embedding=self._entry("embedding.npy"),
            blocks=blocks,
            final_norm=final_norm,
            head=head,
            drafter=drafter,
            parity=parity,
            made_with=_versions(),
        )

    def _blocks(self, taps: tuple[int, ...]) -> Iterator[BlockEntry]:
        """Files of ``block_size`` layers, and one more cut before each layer whose rows the drafter wants."""
        num_layers = self.checkpoint.geometry.num_layers
        (self.directory / "blocks").mkdir()
        cuts = sorted({*range(0, num_layers, self.options.block_size), *taps, num_layers})
        for start, stop in itertools.pairwise(cuts):
            block = build_block(self.checkpoint.layer_shape, start, stop, self.checkpoint.layers(start, stop))
            name = f"blocks/layers-{start:03d}-{stop:03d}.onnx"
            path = self._write(block, block_spec(block), name)
            self.check.check_block(block, path)
            self.say(f"layers [{start}, {stop}) of {num_layers}: error {self.check.block_errors[-1]:.1e}")
            memory_bytes = sum(tensor.numel() * tensor.element_size() for tensor in block.parameters())
            yield BlockEntry(**describe_file(self.directory, name), start=start, stop=stop, memory_bytes=memory_bytes)

    def _final_norm(self) -> tuple[FileEntry, float]:
        """Never quantised: it has no matrix."""
        norm = build_final_norm(self.checkpoint.final_norm(), self.checkpoint.geometry.rms_norm_eps)
        path = self.directory / "final_norm.onnx"
        export_graph(norm, final_norm_spec(norm), path)
        error = self.check.check_final_norm(norm, path)
        self.say(f"chain of all blocks and final norm: error {error:.1e}")
        return self._entry(path.name), error

    def _head(self) -> tuple[FileEntry, float]:
        head = build_head(self.checkpoint.lm_head())
        path = self._write(head, head_spec(head), "head.onnx")
        error = self.check.check_head(head, path)
        self.say(f"head: error {error:.1e}")
        return self._entry(path.name), error

    def _drafter(self, draft_head: DraftHead | Eagle3Head) -> tuple[DrafterEntry, float]:
        drafter = draft_head.build()
        path = self._write(drafter, block_spec(drafter), "drafter.onnx")
        error = self.check.check_drafter(drafter, path)
        parts: dict[str, FileEntry] = {}
        if isinstance(draft_head, Eagle3Head):
            fuse, top = draft_head.build_fuse(), draft_head.build_top()
            fuse_path = self._write(fuse, fuse_spec(fuse), "fuse.onnx")
            top_path = self._write(top, top_spec(top), "draft_top.onnx")
            error = max(error, self.check.check_fuse(fuse, fuse_path), self.check.check_top(top, top_path))
            parts = {"fuse": self._entry(fuse_path.name), "top": self._entry(top_path.name)}
        self.say(f"drafter ({draft_head.kind}): error {error:.1e}")
        shape = draft_head.shape
        entry = DrafterEntry(
            **describe_file(self.directory, path.name),
            kind=draft_head.kind,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            rope_frequencies=list(shape.rope_frequencies),
            taps=list(draft_head.taps),
            **parts,
        )
        return entry, error

    def _write(self, module: nn.Module, spec: GraphSpec, name: str) -> Path:
        """Export a graph; where asked, quantise it and give ``module`` the weights it now stands for."""
        path = self.directory / name
        export_graph(module, spec, path)
        if self.options.precision != "fp32":
            weights = quantize_graph(path)
            unexpected = module.load_state_dict(weights, strict=False, assign=True).unexpected_keys
            assert not unexpected, unexpected
        return path

    def _entry(self, name: str) -> FileEntry:
        return FileEntry(**describe_file(self.directory, name))


def _exact_table(embedding: torch.Tensor) -> np.ndarray:
    """The embedding as float16 where that loses nothing, else as float32."""
    halved = embedding.half()
    exact = torch.equal(halved.float(), embedding.float())
    return (halved if exact else embedding.float()).numpy()


def _probe_tokens(checkpoint: Checkpoint) -> list[int]:
    try:
        tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer_path))
    except Exception as cause:  # the tokenizers library raises bare Exception
        raise CheckpointError(f"{checkpoint.tokenizer_path}: not readable as a tokenizer ({cause})") from cause
    token_ids = tokenizer.encode(PROBE_TEXT).ids
    if not token_ids:
        raise CheckpointError(f"{checkpoint.tokenizer_path}: makes no tokens of plain text")
    if max(token_ids) >= checkpoint.geometry.vocab_size:
        raise CheckpointError(
            f"{checkpoint.tokenizer_path}: token {max(token_ids)} is outside the model's vocabulary of "
            f"{checkpoint.geometry.vocab_size}; the tokenizer belongs to another model"
        )
    return token_ids


def _versions() -> dict[str, str]:
    versions: dict[str, str] = {}
    for name in MADE_WITH:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a source tree
            continue
    return versions


def _check_out(options: ExportOptions) -> None:
    out = options.out
    if options.block_size < 1:
        raise BundleError(f"--block-size is {options.block_size}; at least 1 layer goes into a file")
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
    """A directory beside ``out`` that takes its place at the end, or vanishes when anything fails."""
    out = options.out
    aside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".part"))
    try:
        yield aside
        os.chmod(aside, 0o755)  # mkdtemp's is private
        if out.exists():
            replaced = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".part"))
            out.rename(replaced / out.name)
            aside.rename(out)
            shutil.rmtree(replaced)
        else:
            aside.rename(out)
    except OSError as cause:
        raise BundleError(f"{out}: could not be written ({cause})") from cause
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def report(manifest: Manifest) -> dict[str, Any]:
    """The parity report and sizes as plain data, for ``--json``."""
    return {
        "name": manifest.name,
        "precision": manifest.precision,
        "num_bytes": sum(entry.num_bytes for entry in manifest.files()),
        "parity": vars(manifest.parity),
        "made_with": manifest.made_with,
    }
