"""One export under way. Each part of the model is written in every precision asked for, compared with a reference, and
freed before the next part is read.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from exporter.built_in import calibration_texts
from exporter.calibration import LM_HEAD, Activations, Calibration
from exporter.embedding import write_embedding
from exporter.layer_graph import Weights, loaded_bytes, write_block, write_final_norm, write_head
from exporter.matrices import Matrix
from exporter.parity import ChainCheck
from exporter.precisions import OWN, PRECISIONS, Precision
from exporter.quality import Evaluation, QualityCheck, in_windows
from exporter.reference import FollowedProducts, NumpyLayers, finished_logits, rms_norm
from exporter.source import Report, Source, versions_of
from exporter.steps import PROBE_TEXT, probe_steps
from flowspec_edge.engine.padding import min_rows
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.errors import CheckpointError, QualityError
from flowspec_edge.manifest import (
    BlockEntry,
    DrafterEntry,
    FileEntry,
    Manifest,
    OriginEntry,
    Parity,
    Quality,
    describe_file,
)

HEAD = "head.onnx"


class Draft(Protocol):
    """A draft head to be written beside the model."""

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers whose input it reads; files end before them."""
        ...

    @property
    def libraries(self) -> tuple[str, ...]: ...

    def write(self, directory: Path, precision: Precision, check: ChainCheck) -> tuple[DrafterEntry, float]:
        """Write its files, and return their entry and the largest error."""
        ...


class Assembly:
    """A bundle in the making, in ``directory``.

    ``precisions`` names every precision in which blocks are written. The first one that loses little enough is the
    bundle's own, in which head and drafter are written too. ``evaluation`` is what that is measured on, None where it
    is not.
    """

    def __init__(
        self,
        source: Source,
        directory: Path,
        precisions: Sequence[str],
        evaluation: Evaluation | None,
        report: Report,
    ) -> None:
        self.source, self.directory, self.report = source, directory, report
        self.precisions = [PRECISIONS[name] for name in precisions]
        tokenizer = source.write_tokenizer(directory / "tokenizer.json", report)
        token_ids, max_context = _encode(tokenizer, PROBE_TEXT, source), source.geometry.max_context
        self.embedding = write_embedding(source, directory / "embedding.npy")
        self.checks = {
            precision.name: ChainCheck(
                probe_steps(token_ids, max_context, min_rows(precision.name)),
                self.embedding,
                precision.tolerance,
                drafter_tolerance=precision.drafter_tolerance,
                chain_tolerance=precision.chain_tolerance,
                reference=precision.reference,
            )
            for precision in self.precisions
        }
        self.refused: dict[str, str] = {}
        names = [precision.name for precision in self.precisions]
        self._quality = None
        if evaluation is not None:
            self._quality = QualityCheck.of(evaluation, tokenizer, max_context, self.embedding, names)
        self._max_loss = evaluation.max_loss if evaluation is not None else math.inf
        self._calibration: Calibration | None = None
        if num_tokens := max(precision.num_calibration_tokens for precision in self.precisions):
            self._calibration = Calibration(
                in_windows(tokenizer, calibration_texts(), max_context, num_tokens),
                self.embedding,
                has_squares=any(precision.feeds_back for precision in self.precisions),
                dtype=np.float64 if names == [OWN] else np.float32,  # boards make that of a GGUF file, each by itself
            )

    def assemble(self, name: str, block_size: int, draft: Draft | None) -> Manifest:
        source = self.source
        blocks = self._blocks(block_size, draft.taps if draft else ())
        final_norm, chain_errors = self._final_norm()
        own, head, head_error, quality = self._head(blocks)
        check = self.checks[own.name]
        drafter, drafter_error = draft.write(self.directory, own, check) if draft else (None, None)
        if drafter is None:
            self.report("no draft head: drafts come from repetitions in the text alone")
        else:
            self.report(f"drafter ({drafter.kind}): error {drafter_error:.1e}")
        parity = Parity(
            tolerance=check.tolerance,
            chain_error=chain_errors[own.name],
            block_errors=check.block_errors,
            head_error=head_error,
            drafter_error=drafter_error,
            reference=own.reference,
            num_rows=check.num_rows,
        )
        return Manifest(
            name=name,
            architecture=source.architecture,
            precision=own.name,
            geometry=source.geometry,
            bos_token_id=source.bos_token_id,
            eos_token_ids=source.eos_token_ids,
            chat_template=source.chat_template,
            tokenizer=self._entry("tokenizer.json"),
            embedding=self._entry("embedding.npy"),
            blocks=blocks.pop(own.name),
            final_norm=final_norm,
            head=head,
            drafter=drafter,
            parity=parity,
            made_with=versions_of([*source.libraries, *(draft.libraries if draft else ())]),
            alternatives=blocks,
            quality=quality,
        )

    def _blocks(self, block_size: int, taps: tuple[int, ...]) -> dict[str, list[BlockEntry]]:
        """Write the layers to files and return the files' entries by precision.

        A file has ``block_size`` layers, or fewer where it ends before a layer in ``taps``, whose input the drafter
        reads.
        """
        num_layers = self.source.geometry.num_layers
        (self.directory / "blocks").mkdir()
        cuts = sorted({*range(0, num_layers, block_size), *taps, num_layers})
        blocks: dict[str, list[BlockEntry]] = {precision.name: [] for precision in self.precisions}
        for start, stop in itertools.pairwise(cuts):
            weights = self.source.layers(start, stop)
            shape, layers = self.source.layer_shape, range(start, stop)
            if self._quality is not None:
                self._quality.run_reference(NumpyLayers(shape, layers, weights, self._quality.capacity))
            if self._calibration is not None:
                self._calibration.run(shape, layers, weights)
            for precision in self.precisions:
                blocks[precision.name].append(self._block(start, stop, weights, precision))
        return blocks

    def _block(self, start: int, stop: int, weights: Weights, precision: Precision) -> BlockEntry:
        """Write and compare one block in one precision."""
        suffix = "" if precision is self.precisions[0] else f".{precision.name}"
        path = self.directory / f"blocks/layers-{start:03d}-{stop:03d}{suffix}.onnx"
        source, shape, check = self.source, self.source.layer_shape, self.checks[precision.name]
        formed = {
            name: self._formed(weight, precision, f"{path.name}: {name}", self._seen(name, precision))
            for name, weight in weights.items()
        }
        shown = path.with_suffix(".shown") if precision.rounds_activations else None
        products = write_block(shape, start, stop, formed, path, shown)
        layers = f"[{start}, {stop})"
        if shown is not None:
            followed = FollowedProducts(products)
            reference = NumpyLayers(shape, range(start, stop), formed, check.capacity, followed)
            check.check_products(reference, followed, shape, path, shown, layers)
            shown.unlink()
        else:
            check.check_block(NumpyLayers(shape, range(start, stop), formed, check.capacity), shape, path, layers)
        if self._quality is not None:
            self._quality.run(precision.name, path, shape)
        num_layers = source.geometry.num_layers
        self.report(f"layers {layers} of {num_layers}, {precision.name}: error {check.block_errors[-1]:.1e}")
        entry = describe_file(self.directory, f"blocks/{path.name}")
        return BlockEntry(**entry, start=start, stop=stop, memory_bytes=loaded_bytes(formed, products))

    def _seen(self, name: str, precision: Precision) -> Activations | None:
        """What has entered a matrix of the last block, or the head, where that counts."""
        module = name.removesuffix(".weight")
        return self._calibration.seen.get(module) if self._calibration and precision.looks_at(module) else None

    def _formed(
        self, weight: Matrix | np.ndarray, precision: Precision, what: str, activations: Activations | None
    ) -> Matrix | np.ndarray:
        if isinstance(weight, np.ndarray):
            return weight
        try:
            return precision.form(weight, activations)
        except CheckpointError as cause:
            raise CheckpointError(f"{what} {cause}") from cause

    def _final_norm(self) -> tuple[FileEntry, dict[str, float]]:
        """Write the final norm, which has no matrix and so is float32 in every precision.

        Returns its entry, and the error of the whole chain in each precision.
        """
        weight, eps = self.source.final_norm(), self.source.layer_shape.rms_norm_eps
        path = self.directory / "final_norm.onnx"
        write_final_norm(weight, eps, path)

        def norm(rows: np.ndarray) -> np.ndarray:
            return rms_norm(rows, weight, eps)

        errors = {name: check.check_final_norm(norm, path) for name, check in self.checks.items()}
        if self._quality is not None:
            self._quality.run_final_norm(norm, path)
        if self._calibration is not None:
            self._calibration.run_final_norm(norm)
        for name, error in errors.items():
            self.report(f"chain of all blocks and final norm, {name}: error {error:.1e}")
        return self._entry(path.name), errors

    def _head(self, blocks: dict[str, list[BlockEntry]]) -> tuple[Precision, OriginEntry, float, list[Quality]]:
        """Write the head in the first precision that loses little enough with it, and remove the ``blocks`` of those
        that do not.

        Returns that precision, the head's entry and error, and the qualities of all that are left.

        Raises:
            QualityError: all of them lose too much.
        """
        matrix = self.source.lm_head()
        if self._quality is not None:
            self._quality.run_reference_head(matrix, self._finished)
        for own in self.precisions:
            head, error = self._write_head(matrix, own)
            kept = self._measured(own)
            if own.name not in self.refused:
                break
        else:
            raise QualityError(self.refused.values())
        for precision in self.precisions[self.precisions.index(own) + 1 :]:
            kept += self._measured(precision)
        for name in self.refused:
            for block in blocks.pop(name):
                (self.directory / block.file).unlink()
        return own, head, error, kept

    def _write_head(self, matrix: Matrix, precision: Precision) -> tuple[OriginEntry, float]:
        path = self.directory / HEAD
        formed = self._formed(matrix, precision, f"{path.name}: the head", self._seen(LM_HEAD, precision))
        assert not isinstance(formed, np.ndarray)
        shape = self.source.layer_shape
        memory_bytes = write_head(formed, path, shape.logit_divisor, shape.logit_cap)
        error = self.checks[precision.name].check_head(lambda rows: self._finished(formed.times(rows)), path)
        self.report(f"head: error {error:.1e}")
        return OriginEntry(**describe_file(self.directory, path.name), memory_bytes=memory_bytes), error

    def _measured(self, precision: Precision) -> list[Quality]:
        """The quality of a precision where it is measured. It is reported, and the precision refused where it loses too
        much.
        """
        if self._quality is None:
            return []
        found = self._quality.measure(precision.name, self.directory / HEAD)
        self.report(
            f"{found.precision} on {found.num_tokens} tokens of {found.text}: error {found.max_error:.1e}, "
            f"same token {found.greedy_agreement:.1%}, perplexity {found.perplexity:.3f} "
            f"(float32: {found.reference_perplexity:.3f}, {found.loss:+.2%})"
        )
        if found.loss <= self._max_loss:
            return [found]
        self.refused[precision.name] = (
            f"{precision.name}: perplexity grows by {found.loss:.1%}, more than --max-loss {self._max_loss:.1%}"
        )
        self.report(f"{self.refused[precision.name]}; it is left out")
        return []

    def _finished(self, logits: np.ndarray) -> np.ndarray:
        return finished_logits(self.source.layer_shape, logits)

    def _entry(self, name: str) -> FileEntry:
        return FileEntry(**describe_file(self.directory, name))


def _encode(tokenizer: Tokenizer, text: str, source: Source) -> list[int]:
    token_ids = tokenizer.encode(text)
    if not token_ids:
        raise CheckpointError(f"{source.path}: its tokenizer makes no tokens of plain text")
    return token_ids
