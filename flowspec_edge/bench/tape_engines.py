"""Stages and head that are played from tapes, one tape per session, and the real drafter beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from flowspec_edge.bench.tape import Tape
from flowspec_edge.core import events as ev
from flowspec_edge.core.rows import NO_PARENT, Row, SessionSpec, SlotMove
from flowspec_edge.core.speculation.constraint import Constraint, check_drafts
from flowspec_edge.core.speculation.verify import Noise, draw_tokens, rank_drafts
from flowspec_edge.engine.drafters.drafter import Drafter


class PlayedTape:
    """A target played from a tape. A hidden row is its position plus one on the text, and 0 off it."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        # Per draft id: position plus one, 0 off the text. Those of the prompt may be at the stages from before.
        self._places: dict[int, int] = {id: id + 1 for id in range(len(tape.prompt))}

    def forward(self, rows: tuple[Row, ...]) -> ev.Floats:
        tokens = self._tape.tokens
        out = np.zeros((len(rows), 1), np.float32)
        for index, row in enumerate(rows):
            place = self._places.get(row.id)
            if place is None:
                above = 0 if row.parent == NO_PARENT else self._places[row.parent]
                on_text = (above or row.parent == NO_PARENT) and above < len(tokens) and tokens[above] == row.token
                place = self._places[row.id] = above + 1 if on_text else 0
            out[index] = place
        return out

    def logits(self, hidden: ev.Floats) -> ev.Floats:
        return self._tape.logits[hidden[:, 0].astype(np.int64) - 1]

    def hidden(self, hidden: ev.Floats) -> ev.Floats:
        """What the drafter gets: the target's own rows."""
        return self._tape.hidden[hidden[:, 0].astype(np.int64) - 1]


class PlayedTapes:
    """The tapes of a ring's sessions. Stages and origin of the ring share them."""

    def __init__(self) -> None:
        self._by_session: dict[int, PlayedTape] = {}

    def add(self, session: int, tape: Tape) -> None:
        """Before the session is opened."""
        self._by_session[session] = PlayedTape(tape)

    def __getitem__(self, session: int) -> PlayedTape:
        return self._by_session[session]


class TapeStage:
    """One stage of a target that is played from tapes; the stages of a ring may be one object."""

    def __init__(self, played: PlayedTapes) -> None:
        self._played = played

    def open_cache(self, session: int, capacity: int) -> None: ...

    def free_cache(self, session: int) -> None: ...

    def keep_cache(self, session: int, moves: Sequence[SlotMove]) -> None: ...

    def take_over_cache(self, session: int, kept: int) -> bool:
        return True

    def run(self, forward: ev.RunForward, *, is_cancelled: bool) -> ev.ForwardFinished:
        if is_cancelled:
            return ev.ForwardFinished(np.zeros((0, 1), np.float32))
        return ev.ForwardFinished(self._played[forward.session].forward(forward.rows))


class TapeOrigin:
    """The target's head from tapes, and the real drafter."""

    def __init__(
        self, played: PlayedTapes, drafter: Drafter | None, noise: Noise, constraint: Constraint | None = None
    ) -> None:
        self._played, self._drafter, self._noise, self._constraint = played, drafter, noise, constraint

    def open(self, spec: SessionSpec) -> None:
        if self._drafter is not None:
            self._drafter.open(spec.session, spec.capacity)

    def close(self, session: int) -> None:
        if self._drafter is not None:
            self._drafter.close(session)

    def keep(self, session: int, taken: Sequence[int]) -> None:
        self.close(session)

    def check(self, job: ev.CheckDrafts) -> ev.DraftsChecked:
        assert self._constraint is not None, "only a grammar checks"
        return check_drafts(job, self._constraint)

    def run(self, job: ev.RunHead | ev.RunDraft) -> ev.HeadFinished | ev.DraftFinished:
        played = self._played[job.session]
        if isinstance(job, ev.RunHead):
            return draw_tokens(job, played.logits(job.hidden), self._noise, self._constraint)
        assert self._drafter is not None
        hidden = played.hidden(job.hidden) if len(job.hidden) else job.hidden
        return rank_drafts(job, self._drafter.run(replace(job, hidden=hidden)), self._noise, self._constraint)
