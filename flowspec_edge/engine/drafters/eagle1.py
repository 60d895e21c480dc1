"""An EAGLE-1 draft head: one decoder layer that predicts the target's next feature from a feature and a token.

The pair (hidden row at position i, token i+1) is at position i. A verified pair has the target's own hidden row; a
drafted pair has the feature that the head predicted for its parent. Both keep a cache slot for as long as their row
lives, and a row that is run again is written to the same slot. So a row can be run anew when the target has verified
its parent, and the rows that were drafted below it stay usable. (Li et al., EAGLE, arXiv 2401.15077, section 3.)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from flowspec_edge.core.events import DraftFinished, RunDraft
from flowspec_edge.core.rows import Floats, Row
from flowspec_edge.core.speculation.kv_slots import FIRST_SLOT
from flowspec_edge.engine.graphs import CachedGraph, HiddenRows, KvCache, StepInputs, as_ort_value, pad_rows
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.padding import min_rows
from flowspec_edge.engine.rotary import RotaryTables
from flowspec_edge.engine.stage_runner import load_embedding
from flowspec_edge.errors import BundleError
from flowspec_edge.manifest import FEATURE, TOKEN_EMBEDDING, Manifest

PASS_ROWS = 256
"""Rows per run of the graph at most, so that a long prompt does not need a mask of its length squared."""


class _DraftSession:
    """The cache of one session, and the slot of each row by draft id (``home``).

    New rows are computed in slots behind all those in use, and then moved to their own. ``seen`` and ``features`` are
    needed for a row's children, so they are kept for drafted rows and the last verified row only.
    """

    def __init__(self, cache: KvCache, step: StepInputs, capacity: int) -> None:
        self.cache = cache
        self.step = step
        self.binding: ort.IOBinding | None = None  # until the first run
        self.capacity = capacity
        self.num_slots = FIRST_SLOT  # those in use and those in ``free``
        self.free: list[int] = []
        self.home: dict[int, int] = {}
        self.seen: dict[int, NDArray[np.bool_]] = {}  # per row: itself and its ancestors, [capacity] by slot
        self.features: dict[int, Floats] = {}  # per row: the predicted feature, from which its children are drafted

    def forget(self, ids: tuple[int, ...]) -> None:
        for id in ids:
            if id in self.home:
                self.free.append(self.home.pop(id))
                del self.seen[id], self.features[id]

    def verify(self, rows: tuple[Row, ...]) -> None:
        """Note that these rows are verified. Their parents will have no other child."""
        for row in rows:
            self.seen.pop(row.parent, None)
            self.features.pop(row.parent, None)

    def mask(self, rows: tuple[Row, ...]) -> NDArray[np.bool_]:
        """Which slots each row sees while ``rows`` are behind all slots in use: [rows, slots in use + rows]."""
        base = self.num_slots
        mask = np.zeros((len(rows), base + len(rows)), np.bool_)  # [rows, slots]
        place = {row.id: index for index, row in enumerate(rows)}
        for index, row in enumerate(rows):
            above = place.get(row.parent)
            if above is not None and above < index:
                mask[index] = mask[above]
            else:
                mask[index, :base] = self._seen_by(row.parent)[:base]
            mask[index, base + index] = True
        return mask

    def settle(self, rows: tuple[Row, ...], features: Floats) -> None:
        """Move the values that were just computed to each row's own slot."""
        sources, targets = [], []
        base = self.num_slots
        for index, row in enumerate(rows):
            slot = self.home.get(row.id)
            if slot is None:
                slot = self.free.pop() if self.free else self.num_slots
                if slot == self.num_slots:
                    self.num_slots += 1
                seen = self._seen_by(row.parent).copy()
                seen[slot] = True
                self.seen[row.id] = seen
                self.home[row.id] = slot
            if slot != base + index:
                sources.append(base + index)
                targets.append(slot)
            self.features[row.id] = features[index]
        self.cache.gather(sources, targets)

    def _seen_by(self, parent: int) -> NDArray[np.bool_]:
        """The slots that a child of ``parent`` sees.

        The text's first token is in no pair, so the first pair sees none.
        """
        return self.seen[parent] if self.home else np.zeros(self.capacity, np.bool_)


class Eagle1Drafter:
    """The draft head of a bundle. It shares the target's embedding and head."""

    kind = "eagle1"

    def __init__(self, directory: Path, manifest: Manifest, head: Head, *, k: int, num_threads: int = 1) -> None:
        if manifest.drafter is None or manifest.drafter.kind != self.kind:
            raise BundleError(f"{directory}: this bundle has no draft head of kind {self.kind}")
        self._entry = manifest.drafter
        self._min_rows = min_rows(manifest.precision)
        self._graph = CachedGraph(directory / self._entry.file, 0, 1, num_threads)
        self._rotary = RotaryTables(self._entry.rope_frequencies)
        self._embedding = load_embedding(directory, manifest)
        self._head = head
        self._k = k
        self._sessions: dict[int, _DraftSession] = {}

    def open(self, session: int, capacity: int) -> None:
        """Make a cache for a session whose stages have ``capacity`` slots.

        Each drafted row needs a slot here as well.
        """
        capacity += PASS_ROWS
        cache = KvCache(1, self._entry.num_kv_heads, capacity, self._entry.head_dim)
        self._sessions[session] = _DraftSession(cache, StepInputs(self._min_rows), capacity)

    def close(self, session: int) -> None:
        self._sessions.pop(session, None)

    def run(self, job: RunDraft) -> DraftFinished:
        """Run one pass.

        The proposed tokens and their log-probabilities are [rows, k], for the last verified pair if there is one, and
        then for the drafted rows.
        """
        session = self._sessions.get(job.session)
        if session is None:  # cancelled meanwhile
            return DraftFinished(np.zeros((0, self._k), np.int64), np.zeros((0, self._k), np.float32))
        if session.binding is None:
            tables = self._rotary.reach(session.cache.num_slots)
            session.binding = self._graph.bind(session.cache.values, {**tables, **session.step.numbers})
        session.forget(job.dropped)
        num_verified = len(job.hidden)
        drafted = [session.features[row.parent] for row in job.rows[num_verified:]]
        inputs = np.stack([*self._features_of(job.hidden), *drafted])  # [rows, hidden_size]
        features = []
        for first in range(0, len(job.rows), PASS_ROWS):
            part = slice(first, first + PASS_ROWS)
            features.append(self._forward(session, job.rows[part], inputs[part], job.positions[part]))
            session.verify(job.rows[:num_verified][part])
        wanted = np.concatenate(features)[max(num_verified - 1, 0) :]
        return DraftFinished(*self._propose(wanted))

    def _propose(self, features: Floats) -> tuple[NDArray[np.int64], Floats]:
        """The likeliest tokens after each feature and their log-probabilities, both [rows, k]."""
        return self._head.top(features, self._k)

    def _features_of(self, hidden: Floats) -> Floats:
        """Features of verified rows, [rows, hidden_size], made from the hidden rows that ``RunDraft`` brings."""
        return hidden

    def _forward(
        self, session: _DraftSession, rows: tuple[Row, ...], features: Floats, positions: NDArray[np.int64]
    ) -> Floats:
        embedded = self._embedding[[row.token for row in rows]].astype(np.float32)
        hidden = HiddenRows(features, self._min_rows)
        inputs = session.step.set(session.mask(rows), positions)
        inputs |= {TOKEN_EMBEDDING: as_ort_value(pad_rows(embedded, self._min_rows)), FEATURE: hidden.source}
        self._graph.bind_step(session.binding, inputs, hidden.target)
        self._graph.run_bound(session.binding)
        hidden.advance()
        out = hidden.array[0, : len(rows)]
        session.settle(rows, out)
        return out
