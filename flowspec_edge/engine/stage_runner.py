"""Runs a stage's layers on ONNX Runtime: any contiguous range of blocks, chained without copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from flowspec_edge.allocator import give_back_freed
from flowspec_edge.core.events import ForwardFinished, RunForward
from flowspec_edge.core.rows import Floats
from flowspec_edge.engine.embedding import Embedding
from flowspec_edge.engine.graphs import CachedGraph, HiddenRows, KvCache, StepInputs, load_graph
from flowspec_edge.engine.integer_products import EXACT_PRECISION, check_integer_products
from flowspec_edge.engine.memory import frugal_allocation
from flowspec_edge.engine.padding import min_rows
from flowspec_edge.engine.rotary import RotaryTables, Tables
from flowspec_edge.errors import PlacementError, StageFailedError
from flowspec_edge.manifest import HIDDEN, HIDDEN_OUT, BlockEntry, FileEntry, Manifest

Parts = Mapping[str, Any]
"""What was loaded of files, by their sha256: the graphs of blocks and of the final norm, and the embedding."""


@dataclass(slots=True)
class _Session:
    """A session's cache, and the bindings of the blocks to it, which are made when the session runs for
    the first time.
    """

    cache: KvCache
    step: StepInputs
    tables: Tables
    bindings: list[ort.IOBinding] = field(default_factory=list)


def _load(directory: Path, manifest: Manifest, entry: FileEntry, num_threads: int) -> Any:
    """What a stage has of a file."""
    if isinstance(entry, BlockEntry):
        return CachedGraph(directory / entry.file, entry.start, entry.stop, num_threads)
    if entry == manifest.embedding:
        return Embedding(directory / entry.file)
    return load_graph(directory / entry.file, num_threads)


class StageRunner:
    """Layers ``[start, stop)`` of a bundle. The first stage embeds, the last one applies the final norm.

    ``parts`` is what it has loaded. What is among ``loaded`` is taken from there; it may be the part of another runner,
    as long as the two are not used at once. A runner is not safe to use from several threads at once.

    Raises:
        PlacementError: the range does not fall on the bundle's block boundaries.
        BundleError: a file is missing or cannot be loaded, or the bundle does not have the precision.
    """

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        start: int,
        stop: int,
        *,
        num_threads: int = 1,
        precision: str | None = None,
        loaded: Parts | None = None,
    ) -> None:
        blocks = manifest.blocks_of(start, stop, precision)
        if not blocks or (blocks[0].start, blocks[-1].stop) != (start, stop):
            cuts = ", ".join(str(block.start) for block in manifest.blocks)
            raise PlacementError(f"layers [{start}, {stop}) cannot be cut from this bundle; its blocks begin at {cuts}")
        if (precision or manifest.precision) == EXACT_PRECISION:
            check_integer_products()
        self._geometry = manifest.geometry
        self._min_rows = min_rows(precision or manifest.precision)
        self._start, self._num_layers = start, stop - start
        self._taps = frozenset(manifest.drafter.taps if manifest.drafter else ())
        loaded = loaded or {}
        self.parts: dict[str, Any] = {}
        for entry in manifest.stage_files(start, stop, precision):
            found = loaded.get(entry.sha256)
            self.parts[entry.sha256] = _load(directory, manifest, entry, num_threads) if found is None else found
        self._blocks: list[tuple[int, int, CachedGraph]] = [
            (block.start - start, block.stop - start, self.parts[block.sha256]) for block in blocks
        ]
        self._embedding: Embedding | None = self.parts.get(manifest.embedding.sha256)
        self._final_norm: ort.InferenceSession | None = self.parts.get(manifest.final_norm.sha256)
        self._rotary = RotaryTables(manifest.geometry.rope_frequencies)
        self._sessions: dict[int, _Session] = {}

    def open_cache(self, session: int, capacity: int) -> None:
        """Make room for ``capacity`` slots, the reserved one included.

        Raises:
            StageFailedError: there is not enough memory.
        """
        geometry = self._geometry
        try:
            cache = KvCache(self._num_layers, geometry.num_kv_heads, capacity, geometry.head_dim)
        except MemoryError as cause:
            raise StageFailedError(
                f"no memory for a KV cache of {capacity} slots ({cause}); ask for fewer tokens"
            ) from cause
        self._sessions[session] = _Session(cache, StepInputs(self._min_rows), self._rotary.reach(cache.num_slots))

    def free_cache(self, session: int) -> None:
        self._sessions.pop(session, None)
        if not self._sessions:
            self._rotary.shrink()

    def free_caches(self) -> None:
        """Those of all sessions, and what else their forwards used; all of it goes back to the system."""
        for session in list(self._sessions):
            self.free_cache(session)
        give_back_freed()

    def close(self) -> None:
        """Free all that takes memory, even if someone still holds the runner, and give it back to the system.

        It can run nothing any more. Other threads can run between the blocks, each of which takes about 0.2 ms per MB.
        """
        self._sessions = {}
        self._embedding = self._final_norm = None
        self._rotary = RotaryTables(self._geometry.rope_frequencies)
        self.parts = {}
        blocks, self._blocks = list(self._blocks), []  # a copy: a forward may go through the list just now
        with frugal_allocation():
            while blocks:
                blocks.pop()

    def run(self, forward: RunForward, is_cancelled: Callable[[], bool] = lambda: False) -> ForwardFinished:
        """Move cache rows, run the layers, and return the rows' hidden states, [rows, hidden_size]; normed if last.

        ``is_cancelled`` is asked before each block; where it says so, the rest is left out and the values mean nothing.
        Where ``forward`` is tapped, the answer has the rows that enter each layer of this range that the drafter taps,
        [rows, hidden_size].

        Raises:
            StageFailedError: ONNX Runtime refused the run.
            BundleError: the embedding's file has changed.
        """
        num_rows = len(forward.rows)
        session = self._sessions.get(forward.session)
        if session is None:  # closed between the decision to run and the run; nobody will use the rows
            return self._nothing(num_rows)
        if not session.bindings:  # here, not where the session is opened: the event loop does not wait for it
            session.bindings = self._bind(session)
        session.tables.fill(forward.positions)
        session.cache.move(forward.moves)
        inputs = session.step.set(forward.mask, forward.positions)
        hidden = HiddenRows(self._embed(forward) if forward.hidden is None else forward.hidden, self._min_rows)
        tapped: dict[int, Floats] = {}
        for (start, _, block), binding in zip(self._blocks, session.bindings, strict=True):
            if is_cancelled():
                return self._nothing(num_rows)
            if forward.is_tapped and self._start + start in self._taps:
                tapped[self._start + start] = hidden.array[0, :num_rows].copy()
            inputs[HIDDEN] = hidden.source
            block.bind_step(binding, inputs, hidden.target)
            block.run_bound(binding)
            hidden.advance()
        if self._final_norm is not None:
            binding = self._final_norm.io_binding()
            binding.bind_ortvalue_input(HIDDEN, hidden.source)
            binding.bind_ortvalue_output(HIDDEN_OUT, hidden.target)
            self._final_norm.run_with_iobinding(binding)
            hidden.advance()
        return ForwardFinished(hidden.array[0, :num_rows], tapped)

    def _nothing(self, num_rows: int) -> ForwardFinished:
        return ForwardFinished(np.zeros((num_rows, self._geometry.hidden_size), np.float32))

    def _bind(self, session: _Session) -> list[ort.IOBinding]:
        kept, caches = {**session.tables.inputs, **session.step.numbers}, session.cache.values
        return [block.bind(caches[2 * start : 2 * stop], kept) for start, stop, block in self._blocks]

    def _embed(self, forward: RunForward) -> Floats:
        assert self._embedding is not None, "a chunk without hidden rows reached a stage that does not embed"
        return self._embedding.rows([row.token for row in forward.rows])
