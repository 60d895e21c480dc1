"""Runs a stage's layers on ONNX Runtime: any contiguous range of blocks, chained without copies."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from flowspec_edge.allocator import give_back_freed
from flowspec_edge.core.events import ForwardFinished, RunForward
from flowspec_edge.core.limits import RECENT_ROWS
from flowspec_edge.core.rows import Floats, Placement, SlotMove
from flowspec_edge.engine.attention_inputs import HeadGroups, attention_inputs
from flowspec_edge.engine.embedding import Embedding
from flowspec_edge.engine.graphs import CachedGraph, load_graph
from flowspec_edge.engine.integer_products import EXACT_PRECISION, check_integer_products
from flowspec_edge.engine.kept_caches import KeptCaches
from flowspec_edge.engine.kv_cache import KvCache
from flowspec_edge.engine.memory import frugal_allocation, give_back_behind
from flowspec_edge.engine.padding import padded
from flowspec_edge.engine.rotary import RotaryTables, Tables
from flowspec_edge.engine.row_check import row_multiple
from flowspec_edge.engine.step import Step
from flowspec_edge.errors import CacheFullError, PlacementError
from flowspec_edge.manifest import HIDDEN, HIDDEN_OUT, BlockEntry, FileEntry, Manifest

_log = logging.getLogger(__name__)

Parts = Mapping[str, Any]
"""What was loaded of files, by their sha256: the graphs of blocks and of the final norm, and the embedding."""


@dataclass(slots=True)
class _Session:
    """A session's cache, the bindings of the blocks to it, and what is bound to these beside it."""

    cache: KvCache
    tables: Tables
    bindings: list[ort.IOBinding] = field(default_factory=list)
    step: Step | None = None


class StageRunner:
    """Layers ``[start, stop)`` of a bundle. The first stage embeds, the last one applies the final norm.

    Where it ``has_half_cache``, keys and values are rounded to float16 before their first use and kept so.

    ``parts`` is what it has loaded. What is among ``loaded`` is taken from there; it may be the part of another runner,
    as long as the two are not used at once. A runner is not safe to use from several threads at once. The caches of
    ended sessions are among those that its node has ``kept``.

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
        has_half_cache: bool = False,
        loaded: Parts | None = None,
        kept: KeptCaches | None = None,
    ) -> None:
        blocks = manifest.blocks_of(start, stop, precision)
        if not blocks or (blocks[0].start, blocks[-1].stop) != (start, stop):
            cuts = ", ".join(str(block.start) for block in manifest.blocks)
            raise PlacementError(f"layers [{start}, {stop}) cannot be cut from this bundle; its blocks begin at {cuts}")
        if (precision or manifest.precision) == EXACT_PRECISION:
            check_integer_products()
        self._geometry = manifest.geometry
        self._start, self._num_layers = start, stop - start
        self._taps = frozenset(manifest.drafter.taps if manifest.drafter else ())
        self._largest_block, self._has_half_cache = max(block.stop - block.start for block in blocks), has_half_cache
        found = dict(loaded or {})
        first = next((found[block.sha256] for block in blocks if block.sha256 in found), None)
        if first is None:
            first = found[blocks[0].sha256] = self._load_first(directory, blocks[0], num_threads)
        self.parts: dict[str, Any] = {}
        for entry in manifest.stage_files(start, stop, precision):
            part = found.get(entry.sha256)
            self.parts[entry.sha256] = self._load(directory, manifest, entry, first) if part is None else part
        self._blocks: list[tuple[int, int, CachedGraph]] = [
            (block.start - start, block.stop - start, self.parts[block.sha256]) for block in blocks
        ]
        multiples = self._row_multiples(blocks)
        self._row_multiple, self._is_row_by_row = max(*multiples, 1), 0 in multiples
        self._embedding: Embedding | None = self.parts.get(manifest.embedding.sha256)
        self._final_norm: ort.InferenceSession | None = self.parts.get(manifest.final_norm.sha256)
        self._rotary, self._kept = RotaryTables(manifest.geometry.ropes), kept or KeptCaches()
        self._sessions: dict[int, _Session] = {}

    def open_cache(self, session: int, capacity: int) -> None:
        """Open a session, which will use ``capacity`` slots at most. Memory is taken as they are used.

        Raises:
            StageFailedError: the system has no room for rotary tables of that length.
        """
        geometry = self._geometry
        cache = KvCache(self._num_layers, geometry.num_kv_heads, geometry.head_dim, is_half=self._has_half_cache)
        self._sessions[session] = _Session(cache, self._rotary.reach(capacity))

    def free_cache(self, session: int) -> None:
        """That of a session, which may be a kept one."""
        self._end(session)
        self._kept.take(self, session)

    def keep_cache(self, session: int, moves: Sequence[SlotMove]) -> None:
        """End a session, and keep its cache behind these moves for another one to take over."""
        if (ended := self._end(session)) is None:  # freed meanwhile
            return
        with suppress(CacheFullError):
            self._reach(ended.cache, max((max(move.source, move.target) + move.length for move in moves), default=0))
            ended.cache.move(moves)
            ended.cache.rest()
            self._kept.keep(self, session, ended.cache)

    def take_over_cache(self, session: int, kept: int) -> bool:
        """Give a session that was just opened the cache of a kept one; False where that is there no longer."""
        cache, opened = self._kept.take(self, kept), self._sessions.get(session)
        if cache is None or opened is None:
            return False
        opened.cache = cache
        return True

    def free_caches(self) -> None:
        """Those of all sessions, and what else their forwards used; all of it goes back to the system."""
        for session in list(self._sessions):
            self._end(session)
        self._kept.free_all(self)
        give_back_freed()

    def close(self) -> None:
        """Free all that takes memory, even if someone still holds the runner, and give it back to the system.

        It can run nothing any more. Other threads can run between the blocks, each of which takes about 0.2 ms per MB.
        """
        self._sessions = {}
        self._embedding = self._final_norm = None
        self._rotary = RotaryTables(self._geometry.ropes)
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
            CacheFullError: there is not enough memory for the rows.
            StageFailedError: ONNX Runtime refused the run.
            BundleError: the embedding's file has changed.
        """
        num_rows = len(forward.rows)
        session = self._sessions.get(forward.session)
        if session is None:  # closed between the decision to run and the run; nobody will use the rows
            return self._nothing(num_rows)
        if self._is_row_by_row and num_rows > 1:
            return self._run_row_by_row(forward, is_cancelled)
        step = self._place(session, forward.placement)
        slots = slice(forward.placement.first_slot, forward.placement.first_slot + num_rows)
        step.fill(self._embed(forward) if forward.hidden is None else forward.hidden)
        tapped: dict[int, Floats] = {}
        for number, ((start, stop, block), binding) in enumerate(zip(self._blocks, session.bindings, strict=True)):
            if is_cancelled():
                return self._nothing(num_rows)
            if forward.is_tapped and self._start + start in self._taps:
                tapped[self._start + start] = step.rows[number % 2][0, :num_rows].copy()
            session.cache.fetch(start, stop, slots.start)
            block.run_bound(binding)
            session.cache.keep(start, stop, slots)
        hidden = step.rows[len(self._blocks) % 2]
        if self._final_norm is not None:
            (hidden,) = self._final_norm.run([HIDDEN_OUT], {HIDDEN: hidden})
        give_back_behind(num_rows)
        return ForwardFinished(hidden[0, :num_rows].copy(), tapped)

    def _run_row_by_row(self, forward: RunForward, is_cancelled: Callable[[], bool]) -> ForwardFinished:
        placed, parts = forward.placement, []
        for number, row in enumerate(forward.rows):
            one = slice(number, number + 1)
            placement = Placement(
                placed.moves if not number else (),
                placed.first_slot + number,
                placed.positions[one],
                placed.recent[one],
            )
            hidden = None if forward.hidden is None else forward.hidden[one]
            parts.append(self.run(replace(forward, rows=(row,), hidden=hidden, placement=placement), is_cancelled))
        tapped = {layer: np.concatenate([part.tapped[layer] for part in parts]) for layer in parts[-1].tapped}
        return ForwardFinished(np.concatenate([part.hidden for part in parts]), tapped)

    def _load(self, directory: Path, manifest: Manifest, entry: FileEntry, first: CachedGraph) -> Any:
        """What the stage has of a file; graphs have as many threads as its first block."""
        if isinstance(entry, BlockEntry):
            return self._load_block(directory, entry, first.num_threads)
        if entry == manifest.embedding:
            return Embedding(directory / entry.file)
        return load_graph(directory / entry.file, first.num_threads)

    def _load_block(self, directory: Path, block: BlockEntry, num_threads: int) -> CachedGraph:
        return CachedGraph(
            directory / block.file, block.start, block.stop, num_threads, rounds_cache=self._has_half_cache
        )

    def _load_first(self, directory: Path, block: BlockEntry, num_threads: int) -> CachedGraph:
        """The first block, on as many threads as give rows the same bits in every chunk on this device; it says so
        itself where even one thread gives them only to rows that are run by themselves.
        """
        geometry = self._geometry
        num_products = HeadGroups.of(geometry.num_heads, geometry.num_kv_heads).num_products
        for threads in sorted({min(num_threads, num_products), 1}, reverse=True):
            graph = self._load_block(directory, block, threads)
            if row_multiple(graph, block.stop - block.start, geometry):
                return graph
            _log.warning("with %d threads the bits of a row depend on its chunk on this device", threads)
        return graph

    def _row_multiples(self, blocks: Sequence[BlockEntry]) -> set[int]:
        """What chunks must have a multiple of. Of blocks in several forms, as a GGUF file has them, one of each is
        asked.
        """
        forms = {block.memory_bytes: block for block in reversed(blocks)}.values()
        multiples = {row_multiple(self.parts[one.sha256], one.stop - one.start, self._geometry) for one in forms}
        if 0 in multiples:
            _log.warning("the bits of a row depend on its chunk on this device, so rows run one by one")
        return multiples

    def _place(self, session: _Session, placement: Placement) -> Step:
        """Make room in the cache, make the moves, and have the blocks know where rows are.

        Raises:
            CacheFullError: there is not enough memory.
        """
        geometry, cache = self._geometry, session.cache
        positions, recent = placement.positions, placement.recent
        if num_padding := padded(len(positions), self._row_multiple) - len(positions):  # written behind the others
            positions = np.concatenate([positions, np.zeros(num_padding, np.int64)])
            recent = np.concatenate([recent, np.zeros((num_padding, RECENT_ROWS), np.int64)])
        num_slots = placement.first_slot + len(positions)
        if not session.bindings or not cache.has(num_slots):
            session.bindings, session.step = [], None  # they would hold on to the arrays that the cache outgrows
            self._reach(cache, num_slots)
            session.bindings = self._bind(session)
        session.tables.fill(positions)
        cache.move(placement.moves)
        inputs = attention_inputs(placement.first_slot, positions, recent, geometry, num_slots=cache.num_slots)
        if session.step is None or not session.step.take(inputs):
            session.step = Step(inputs, geometry.hidden_size)
            for number, binding in enumerate(session.bindings):
                session.step.bind(number, binding)
        return session.step

    def _reach(self, cache: KvCache, num_slots: int) -> None:
        """See ``KvCache.reach``. What is kept makes room, the oldest first.

        Raises:
            CacheFullError: there is not enough memory.
        """
        while True:
            try:
                cache.reach(num_slots, self._largest_block)
                return
            except MemoryError as cause:
                if not self._kept.drop_oldest():
                    said = f"no memory for a KV cache of {num_slots} slots ({cause}); ask for fewer tokens"
                    raise CacheFullError(said) from cause

    def _end(self, session: int) -> _Session | None:
        ended = self._sessions.pop(session, None)
        if not self._sessions:
            self._rotary.shrink()
        return ended

    def _nothing(self, num_rows: int) -> ForwardFinished:
        return ForwardFinished(np.zeros((num_rows, self._geometry.hidden_size), np.float32))

    def _bind(self, session: _Session) -> list[ort.IOBinding]:
        tables = session.tables.inputs
        return [block.bind(session.cache.seen(start, stop), tables) for start, stop, block in self._blocks]

    def _embed(self, forward: RunForward) -> Floats:
        assert self._embedding is not None, "a chunk without hidden rows reached a stage that does not embed"
        return self._embedding.rows([row.token for row in forward.rows])
