"""An EAGLE-1 draft head: one decoder layer that predicts the target's next feature from a feature and a token.

The pair (hidden row at position i, token i+1) stands at position i. Verified pairs stay in the head's own cache; drafted ones
are forgotten when the next verified pair comes. (Li et al., EAGLE, arXiv 2401.15077, section 3.)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flowspec_edge.core.events import DraftFinished, ExpandDraft, ExtendDraft, Floats
from flowspec_edge.core.kv_slots import KvSlots
from flowspec_edge.core.tree import Row
from flowspec_edge.engine.graphs import CachedGraph, KvCache, Step, as_ort_value, pad_rows
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.stage_runner import load_embedding
from flowspec_edge.errors import BundleError
from flowspec_edge.manifest import FEATURE, TOKEN_EMBEDDING, Manifest

EXTEND_ROWS = 256
"""Verified pairs per pass, so that a long prompt does not need a mask of its length squared."""


class _DraftSession:
    def __init__(self, cache: KvCache, capacity: int) -> None:
        self.cache = cache
        self.slots = KvSlots(capacity)
        self.drafted: list[int] = []
        self.features: dict[int, Floats] = {}  # predicted feature per row, to expand its children from


class Eagle1Drafter:
    """The draft head of a bundle. It shares the target's embedding and head."""

    def __init__(self, directory: Path, manifest: Manifest, head: Head, *, k: int, num_threads: int = 1) -> None:
        if manifest.drafter is None or manifest.drafter.kind != "eagle1":
            raise BundleError(f"{directory}: this bundle has no EAGLE-1 head")
        self._entry = manifest.drafter
        self._graph = CachedGraph(directory / self._entry.file, 0, 1, num_threads)
        self._embedding = load_embedding(directory, manifest)
        self._head = head
        self._k = k
        self._sessions: dict[int, _DraftSession] = {}

    def open(self, session: int, capacity: int) -> None:
        """Make a cache for a session whose stages hold ``capacity`` slots.

        The stages' room for draft rows is more than enough here: one round expands at most ``width`` rows per pass.
        """
        cache = KvCache(1, self._entry.num_kv_heads, capacity, self._entry.head_dim)
        self._sessions[session] = _DraftSession(cache, capacity)

    def close(self, session: int) -> None:
        self._sessions.pop(session, None)

    def run(self, job: ExtendDraft | ExpandDraft) -> DraftFinished:
        """One pass. Tokens and log-probabilities are [rows, k]: of the last pair when extending, of all when expanding."""
        session = self._sessions.get(job.session)
        if session is None:  # cancelled meanwhile
            return DraftFinished(np.zeros((0, self._k), np.int64), np.zeros((0, self._k), np.float32))
        if isinstance(job, ExtendDraft):
            features = self._extend(session, job)
        else:
            inputs = np.stack([session.features[row.parent] for row in job.rows])  # [rows, hidden_size]
            session.drafted += [row.id for row in job.rows]
            features = self._forward(session, job.rows, inputs, job.positions)
            session.features.update(zip((row.id for row in job.rows), features, strict=True))
        return DraftFinished(*self._head.top(features, self._k))

    def _extend(self, session: _DraftSession, job: ExtendDraft) -> Floats:
        session.slots.drop(session.drafted)  # the newest slots: nothing moves
        session.drafted = []
        for first in range(0, len(job.rows), EXTEND_ROWS):
            part = slice(first, first + EXTEND_ROWS)
            features = self._forward(session, job.rows[part], job.hidden[part], job.positions[part])
        session.features = {job.rows[-1].id: features[-1]}
        return features[-1:]

    def _forward(
        self, session: _DraftSession, rows: tuple[Row, ...], features: Floats, positions: NDArray[np.int64]
    ) -> Floats:
        first = session.slots.append(rows)
        step = Step.from_mask(session.slots.ancestor_mask(first), positions)
        embedded = self._embedding[[row.token for row in rows]].astype(np.float32)
        inputs = {TOKEN_EMBEDDING: as_ort_value(pad_rows(embedded)), FEATURE: as_ort_value(pad_rows(features))}
        out = self._graph.run(inputs, step, session.cache.values)
        return out.numpy()[0, : len(rows)]  # type: ignore[no-any-return]
