"""An EAGLE-1 draft head: one decoder layer that predicts the target's next feature from a feature and a token.

The pair (hidden row at position i, token i+1) stands at position i. A verified pair has the target's own hidden row; a
drafted one has the feature that the head predicted for its parent. Both keep a cache slot for as long as their row
lives, and a row that is run again is written in its place: so the head's view of a token can be refreshed when the
target has verified what stands before it, while what was drafted below it stays usable. (Li et al., EAGLE, arXiv
2401.15077, section 3.)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from flowspec_edge.core.events import DraftFinished, RunDraft
from flowspec_edge.core.limits import MAX_PREFILL_ROWS
from flowspec_edge.core.rows import Floats, Row
from flowspec_edge.core.speculation.draft_slots import DraftSlots
from flowspec_edge.engine.drafters.fused_cache import FusedCache, StepInputs
from flowspec_edge.engine.embedding import Embedding
from flowspec_edge.engine.graphs import CachedGraph, HiddenRows, as_ort_value, load_graph, pad_rows
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.memory import give_back_behind
from flowspec_edge.engine.padding import min_rows
from flowspec_edge.engine.rotary import RotaryTables, Tables
from flowspec_edge.errors import BundleError
from flowspec_edge.manifest import FEATURE, HIDDEN, TOKEN_EMBEDDING, TOP_K, TOP_LOG_PROBS, TOP_TOKENS, Manifest

PASS_ROWS = MAX_PREFILL_ROWS
"""Rows per run of the graph at most, so that a long prompt does not need a mask of its length squared."""


class _DraftSession:
    """The cache of one session. A pass computes its rows behind all slots in use; then they move to their own slots.

    ``features`` serve a row's children, so they are kept for drafted rows and the last verified one only.
    """

    def __init__(self, cache: FusedCache, step: StepInputs, tables: Tables, capacity: int) -> None:
        self.cache = cache
        self.step = step
        self.tables = tables
        self.binding: ort.IOBinding | None = None  # until the first run
        self.slots = DraftSlots(capacity)
        self.features: dict[int, Floats] = {}  # predicted feature per row, to expand its children from

    def forget(self, ids: tuple[int, ...]) -> None:
        """These rows are dead."""
        self.slots.release(ids)
        for id in ids:
            self.features.pop(id, None)

    def verify(self, rows: tuple[Row, ...]) -> None:
        """Note that these rows are verified. Their parents will have no other child."""
        for row in rows:
            self.features.pop(row.parent, None)

    def begin(self, kept: Floats) -> None:
        """The first pairs are those of another session, whose keys and values [2, 1, kv_heads, pairs, head_dim] these
        are.
        """
        num = kept.shape[3]
        self.cache.put(1, kept)
        self.slots.place([Row(id, id - 1, 0) for id in range(1, num + 1)])

    def settle(self, rows: tuple[Row, ...], features: Floats) -> None:
        """Move what was just computed to each row's own slot."""
        base = len(self.slots)
        slots = self.slots.place(rows)
        moves = [(base + index, slot) for index, slot in enumerate(slots) if slot != base + index]
        self.cache.gather([source for source, _ in moves], [target for _, target in moves])
        self.features.update((row.id, features[index]) for index, row in enumerate(rows))


class Eagle1Drafter:
    """The draft head of a bundle. It shares the target's embedding and, unless it has a top of its own for the tokens
    that it drafts, the target's head.
    """

    kind = "eagle1"

    def __init__(self, directory: Path, manifest: Manifest, head: Head, *, k: int, num_threads: int = 1) -> None:
        if manifest.drafter is None or manifest.drafter.kind != self.kind:
            raise BundleError(f"{directory}: this bundle has no draft head of kind {self.kind}")
        self._entry = manifest.drafter
        self._min_rows = min_rows(manifest.precision)
        self._graph = CachedGraph(directory / self._entry.file, 0, 1, num_threads)
        self._rotary = RotaryTables([self._entry.rope_frequencies])
        self._embedding = Embedding(directory / manifest.embedding.file)
        self._head = head
        top = self._entry.top
        self._top = None if top is None else load_graph(directory / top.file, num_threads)
        self._k = k
        self._sessions: dict[int, _DraftSession] = {}
        self._kept: dict[int, Floats] = {}  # keys and values of ended sessions' pairs, in the order of the text

    def open(self, session: int, capacity: int) -> None:
        """Make a cache for a session whose stages hold ``capacity`` slots: a drafted row needs one here as well."""
        capacity += PASS_ROWS
        cache = FusedCache(1, self._entry.num_kv_heads, capacity, self._entry.head_dim)
        tables = self._rotary.reach(cache.num_slots)
        self._sessions[session] = _DraftSession(cache, StepInputs(self._min_rows), tables, capacity)

    def close(self, session: int) -> None:
        """Free what there is of a session, which may be a kept one."""
        self._end(session)
        self._kept.pop(session, None)

    def keep(self, session: int, taken: Sequence[int]) -> None:
        """End a session, and keep its first pairs for another one; ``taken`` are the draft ids of their rows."""
        if (ended := self._end(session)) is not None:
            self._kept[session] = ended.cache.copy(ended.slots.slots_of(taken))

    def take_over(self, session: int, kept: int, num_rows: int) -> None:
        """A session that was just opened goes on from a kept one, with which its first ``num_rows`` pairs agree."""
        pairs, opened = self._kept.pop(kept, None), self._sessions.get(session)
        if pairs is not None and opened is not None:
            opened.begin(pairs[:, :, :, :num_rows])

    def close_all(self) -> None:
        """All sessions that are open or kept."""
        self._sessions.clear()
        self._kept.clear()

    def run(self, job: RunDraft) -> DraftFinished:
        """One pass. Tokens and log-probabilities are [rows, k]: of the last verified pair, if any, and drafted rows."""
        session = self._sessions.get(job.session)
        if session is None:  # cancelled meanwhile
            return DraftFinished(np.zeros((0, self._k), np.int64), np.zeros((0, self._k), np.float32))
        if session.binding is None:
            kept = {**session.tables.inputs, **session.step.numbers}
            session.binding = self._graph.bind(session.cache.values, kept)
        session.forget(job.dropped)
        num_verified = len(job.hidden)
        drafted = [session.features[row.parent] for row in job.rows[num_verified:]]
        inputs = np.stack([*self._features_of(job.hidden), *drafted])  # [rows, hidden_size]
        features = []
        for first in range(0, len(job.rows), PASS_ROWS):
            part = slice(first, first + PASS_ROWS)
            features.append(self._forward(session, job.rows[part], inputs[part], job.positions[part]))
            session.verify(job.rows[:num_verified][part])
        give_back_behind(len(job.rows))
        wanted = np.concatenate(features)[max(num_verified - 1, 0) :]
        return DraftFinished(*self._propose(wanted))

    def _end(self, session: int) -> _DraftSession | None:
        ended = self._sessions.pop(session, None)
        if not self._sessions:
            self._rotary.shrink()
        return ended

    def _propose(self, features: Floats) -> tuple[NDArray[np.int64], Floats]:
        """The likeliest tokens after each feature, by the target's ids, and their log-probabilities: both [rows, k]."""
        if self._top is None:
            return self._head.top(features, self._k)
        inputs = {HIDDEN: pad_rows(features, self._min_rows)[0], TOP_K: np.array([self._k], np.int64)}
        tokens, log_probs = self._top.run([TOP_TOKENS, TOP_LOG_PROBS], inputs)
        return tokens[: len(features)], log_probs[: len(features)]

    def _features_of(self, hidden: Floats) -> Floats:
        """Features of verified rows, [rows, hidden_size], made from the hidden rows that ``RunDraft`` brings."""
        return hidden

    def _forward(
        self, session: _DraftSession, rows: tuple[Row, ...], features: Floats, positions: NDArray[np.int64]
    ) -> Floats:
        embedded = self._embedding.rows([row.token for row in rows])
        hidden = HiddenRows(features, self._min_rows)
        session.tables.fill(positions)
        inputs = session.step.set(session.slots.mask_behind(rows), positions)
        inputs |= {TOKEN_EMBEDDING: as_ort_value(pad_rows(embedded, self._min_rows)), FEATURE: hidden.source}
        self._graph.bind_step(session.binding, inputs, hidden.target)
        self._graph.run_bound(session.binding)
        hidden.advance()
        out = hidden.array[0, : len(rows)]
        session.settle(rows, out)
        return out
