"""One export under way. Each part of the model is written in every precision asked for, compared with torch, and freed
before the next part is read.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import nn

from exporter.drafter import DraftHead
from exporter.eagle3 import Eagle3Head
from exporter.model import Checkpoint
from exporter.onnx_export import GraphSpec, block_spec, export_graph, final_norm_spec, fuse_spec, head_spec, top_spec
from exporter.parity import PROBE_TEXT, ChainCheck, probe_steps
from exporter.precisions import PRECISIONS, Precision
from exporter.quality import QualityCheck
from exporter.stage_module import build_block, build_final_norm, build_head
from exporter.tensors import read_json
from exporter.tokenizer import CONFIG, check_vocabulary, contradictions, write_tokenizer
from flowspec_edge.engine.padding import min_rows
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.errors import CheckpointError
from flowspec_edge.manifest import BlockEntry, DrafterEntry, FileEntry, Manifest, Parity, describe_file

MADE_WITH = ("flowspec-edge", "torch", "optimum", "optimum-onnx", "transformers", "onnx", "onnxruntime")
SCRATCH = "scratch"
"""Directory of the float32 graph from which the files of each precision are made. It is deleted at the end."""

Report = Callable[[str], None]


class Assembly:
    """A bundle in the making, in ``directory``.

    ``precisions`` names every precision in which blocks are written; the first one is the bundle's own, in which head
    and drafter are written too.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        directory: Path,
        precisions: Sequence[str],
        eval_text: tuple[str, str] | None,
        report: Report,
    ) -> None:
        self.checkpoint, self.directory, self.report = checkpoint, directory, report
        self.precisions = [PRECISIONS[name] for name in precisions]
        self.embedding = _exact_table(checkpoint.embedding())
        tokenizer = write_tokenizer(checkpoint.tokenizer_path, directory / "tokenizer.json")
        _check_tokenizer(tokenizer, checkpoint, report)
        token_ids, max_context = _encode(tokenizer, PROBE_TEXT, checkpoint), checkpoint.geometry.max_context
        self.checks = {
            precision.name: ChainCheck(
                probe_steps(token_ids, max_context, min_rows(precision.name)),
                self.embedding,
                precision.tolerance,
                judges_chain=not precision.rounds_activations,
            )
            for precision in self.precisions
        }
        name, text = eval_text or ("built-in", PROBE_TEXT)
        tokens = _encode(tokenizer, text, checkpoint)[:max_context]
        if len(tokens) < 2:
            raise CheckpointError(f"--eval-text {name}: has {len(tokens)} tokens; give a text of a page or more")
        self.quality = QualityCheck(name, tokens, self.embedding, precisions)

    @property
    def own(self) -> Precision:
        return self.precisions[0]

    def assemble(self, name: str, block_size: int, draft_head: DraftHead | Eagle3Head | None) -> Manifest:
        checkpoint, check = self.checkpoint, self.checks[self.own.name]
        np.save(self.directory / "embedding.npy", self.embedding)
        blocks = self._blocks(block_size, draft_head.taps if draft_head else ())
        final_norm, chain_error = self._final_norm()
        head, head_error = self._head()
        drafter, drafter_error = self._drafter(draft_head) if draft_head else (None, None)
        if drafter is None:
            self.report("no draft head: drafts come from repetitions in the text alone")
        quality = self.quality.report(self.directory / head.file)
        for entry in quality:
            self.report(
                f"{entry.precision} on {entry.num_tokens} tokens of {entry.text}: error {entry.max_error:.1e}, "
                f"same token {entry.greedy_agreement:.1%}, perplexity {entry.perplexity:.3f} "
                f"(torch: {entry.reference_perplexity:.3f})"
            )
        shutil.rmtree(self.directory / SCRATCH)
        parity = Parity(
            tolerance=check.tolerance,
            chain_error=chain_error,
            block_errors=check.block_errors,
            head_error=head_error,
            drafter_error=drafter_error,
            reference=self.own.reference,
            num_rows=check.num_rows,
        )
        return Manifest(
            name=name,
            architecture=checkpoint.architecture,
            precision=self.own.name,
            geometry=checkpoint.geometry,
            bos_token_id=checkpoint.bos_token_id,
            eos_token_ids=checkpoint.eos_token_ids,
            chat_template=checkpoint.chat_template,
            tokenizer=self._entry("tokenizer.json"),
            embedding=self._entry("embedding.npy"),
            blocks=blocks.pop(self.own.name),
            final_norm=final_norm,
            head=head,
            drafter=drafter,
            parity=parity,
            made_with=_versions(),
            alternatives=blocks,
            quality=quality,
        )

    def _blocks(self, block_size: int, taps: tuple[int, ...]) -> dict[str, list[BlockEntry]]:
        """Write the layers to files and return the files' entries by precision.

        A file has ``block_size`` layers, or fewer where it ends before a layer in ``taps``, whose input the drafter
        reads.
        """
        num_layers = self.checkpoint.num_layers
        (self.directory / "blocks").mkdir()
        cuts = sorted({*range(0, num_layers, block_size), *taps, num_layers})
        blocks: dict[str, list[BlockEntry]] = {precision.name: [] for precision in self.precisions}
        for start, stop in itertools.pairwise(cuts):
            block = build_block(self.checkpoint.layer_shape, start, stop, self.checkpoint.layers(start, stop))
            name = f"blocks/layers-{start:03d}-{stop:03d}"
            float32 = self._export(block, block_spec(block), f"{name}.onnx")
            self.quality.run_reference(block)
            own_weights = block.state_dict()
            for precision in self.precisions:
                file = f"{name}.onnx" if precision is self.own else f"{name}.{precision.name}.onnx"
                path = self.directory / file
                block.load_state_dict({**own_weights, **precision.write(float32, path)}, assign=True)
                check = self.checks[precision.name]
                check.check_block(block, path)
                self.quality.run(precision.name, path, block.shape)
                self.report(
                    f"layers [{start}, {stop}) of {num_layers}, {precision.name}: error {check.block_errors[-1]:.1e}"
                )
                entry = describe_file(self.directory, file)
                memory_bytes = precision.memory_bytes(block, path)
                blocks[precision.name].append(BlockEntry(**entry, start=start, stop=stop, memory_bytes=memory_bytes))
        return blocks

    def _final_norm(self) -> tuple[FileEntry, float]:
        """Write the final norm, which has no matrix and so is float32 in every precision.

        Returns its entry, and the error of the whole chain in the bundle's own precision.
        """
        norm = build_final_norm(self.checkpoint.final_norm(), self.checkpoint.geometry.rms_norm_eps)
        path = self.directory / "final_norm.onnx"
        export_graph(norm, final_norm_spec(norm), path)
        errors = {name: check.check_final_norm(norm, path) for name, check in self.checks.items()}
        self.quality.run_final_norm(norm, path)
        for name, error in errors.items():
            self.report(f"chain of all blocks and final norm, {name}: error {error:.1e}")
        return self._entry(path.name), errors[self.own.name]

    def _head(self) -> tuple[FileEntry, float]:
        head = build_head(self.checkpoint.lm_head())
        self.quality.run_reference_head(head)
        path = self._write(head, head_spec(head), "head.onnx")
        error = self.checks[self.own.name].check_head(head, path)
        self.report(f"head: error {error:.1e}")
        return self._entry(path.name), error

    def _drafter(self, draft_head: DraftHead | Eagle3Head) -> tuple[DrafterEntry, float]:
        check = self.checks[self.own.name]
        drafter = draft_head.build()
        path = self._write(drafter, block_spec(drafter), "drafter.onnx")
        error = check.check_drafter(drafter, path)
        parts: dict[str, FileEntry] = {}
        if isinstance(draft_head, Eagle3Head):
            fuse, top = draft_head.build_fuse(), draft_head.build_top()
            fuse_path = self._write(fuse, fuse_spec(fuse), "fuse.onnx")
            top_path = self._write(top, top_spec(top), "draft_top.onnx")
            error = max(error, check.check_fuse(fuse, fuse_path), check.check_top(top, top_path))
            parts = {"fuse": self._entry(fuse_path.name), "top": self._entry(top_path.name)}
        self.report(f"drafter ({draft_head.kind}): error {error:.1e}")
        shape = draft_head.shape
        entry = DrafterEntry(
            **describe_file(self.directory, path.name),
            kind=draft_head.kind,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            rope_frequencies=list(shape.rope_frequencies),
            taps=list(draft_head.taps),
            fuse=parts.get("fuse"),
            top=parts.get("top"),
        )
        return entry, error

    def _write(self, module: nn.Module, spec: GraphSpec, name: str) -> Path:
        """Export a graph in the bundle's own precision, and give ``module`` the weights that the file
        now stands for.
        """
        path = self.directory / name
        weights = self.own.write(self._export(module, spec, name), path)
        unexpected = module.load_state_dict(weights, strict=False, assign=True).unexpected_keys
        assert not unexpected, unexpected
        return path

    def _export(self, module: nn.Module, spec: GraphSpec, name: str) -> Path:
        """Export ``module`` in float32 and return the file's path, which is valid until the next call.

        The weights of a large graph are in further files beside it.
        """
        scratch = self.directory / SCRATCH
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        path = scratch / Path(name).name
        export_graph(module, spec, path)
        return path

    def _entry(self, name: str) -> FileEntry:
        return FileEntry(**describe_file(self.directory, name))


def _exact_table(embedding: torch.Tensor) -> np.ndarray:
    """The embedding as float16 where that loses nothing, else as float32."""
    halved = embedding.half()
    exact = torch.equal(halved.float(), embedding.float())
    return (halved if exact else embedding.float()).numpy()


def _check_tokenizer(tokenizer: Tokenizer, checkpoint: Checkpoint, report: Report) -> None:
    bos, eos = checkpoint.bos_token_id, checkpoint.eos_token_ids
    special = eos if bos is None else [bos, *eos]
    check_vocabulary(tokenizer, special, checkpoint.vocab_size, checkpoint.tokenizer_path)
    config = checkpoint.directory / CONFIG
    for contradiction in contradictions(tokenizer, read_json(config) if config.is_file() else {}, bos, eos):
        report(f"note: {contradiction}")


def _encode(tokenizer: Tokenizer, text: str, checkpoint: Checkpoint) -> list[int]:
    token_ids = tokenizer.encode(text)
    if not token_ids:
        raise CheckpointError(f"{checkpoint.tokenizer_path}: makes no tokens of plain text")
    return token_ids


def _versions() -> dict[str, str]:
    versions: dict[str, str] = {}
    for name in MADE_WITH:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a source tree
            continue
    return versions
