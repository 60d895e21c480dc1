"""What travels: rows of the token tree, chunks of them, and what a session asks of its stages.

Each has one type on its whole way, in events, on the wire, on the virtual clock and in tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from flowspec_edge.core.limits import MAX_CHUNK_ROWS, MAX_COUNT, MAX_PASSAGE_S
from flowspec_edge.errors import ProtocolError

Floats = NDArray[np.float32]
Hidden = NDArray[Any]
"""Hidden rows [rows, hidden_size] as they travel, in float32 or in another kind of ``core/row_kinds.py``."""
Count = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
"""A whole number that a peer may send: the number of a session or a row, or a count."""

NO_PARENT = 0xFFFFFFFF
"""The parent of a session's first row. Draft ids are u32 and stay below it."""


class Row(NamedTuple):
    """One token of a session: its draft id, its parent's draft id, the token id."""

    id: int
    parent: int
    token: int


class Advance(NamedTuple):
    """The token after row ``at`` is ``to``."""

    at: int
    to: int


class Before(NamedTuple):
    """What stands before a token: ``tokens`` [n], of which the first ``num_prompt`` are the prompt's."""

    tokens: NDArray[np.int64]
    num_prompt: int

    @property
    def written(self) -> NDArray[np.int64]:
        """Those behind the prompt."""
        return self.tokens[self.num_prompt :]


@dataclass(frozen=True, slots=True, eq=False)
class Paths:
    """The tokens of the paths to some rows, each row's own included.

    All paths begin with ``text`` [n], whose first ``num_prompt`` tokens are the prompt's, and go on with those in
    ``below``, one entry for each row.
    """

    num_prompt: int
    text: NDArray[np.int64]
    below: tuple[tuple[int, ...], ...]

    def before(self, place: int) -> Before:
        """What stands before the token after the row in this place."""
        return Before(np.concatenate([self.text, np.array(self.below[place], np.int64)]), self.num_prompt)


class SlotMove(NamedTuple):
    """Copy the rows of ``length`` slots, those from ``source`` on, to the slots from ``target`` on.

    All of them are read before any is written. Several moves are made in their order.
    """

    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Where in a cache the rows of a forward are, and their recent ancestors.

    First ``moves`` are made; then the rows take the slots from ``first_slot`` on. ``positions`` is [rows], and
    ``recent`` [rows, RECENT_ROWS]: the slots of the last ancestors of each row in order of depth, its own at the end.
    Where a row has fewer, the first ones mean nothing. Older ancestors are in the slots of their positions.
    """

    moves: tuple[SlotMove, ...]
    first_slot: int
    positions: NDArray[np.int64]
    recent: NDArray[np.int64]


class Passage(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a chunk met at one stage: rows run, seconds it waited for its start, seconds its forward took."""

    num_rows: Annotated[int, Meta(ge=1, le=MAX_CHUNK_ROWS)]
    waited_s: Annotated[float, Meta(ge=0, le=MAX_PASSAGE_S)]
    ran_s: Annotated[float, Meta(ge=0, le=MAX_PASSAGE_S)]


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Rows of one session that are sent together, parents before children.

    ``hidden`` is [rows, hidden_size]; None on the hop to the first stage, which embeds the tokens. The origin needs
    hidden rows back of the last ``num_wanted`` rows alone. A stage does not run the chunk before turn ``turn`` of the
    session has begun; 0 stands for no turn. ``passages`` has one entry for each stage that the chunk has passed.
    """

    session: int
    rows: tuple[Row, ...]
    num_wanted: int
    hidden: Hidden | None = None
    turn: int = 0
    passages: tuple[Passage, ...] = ()


class SessionSpec(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the origin asks of every stage for one session: a KV cache of ``capacity`` rows.

    ``cancels`` says whether stages give up forwards over dead rows. Where ``is_tapped`` is set, the session's drafter
    wants the hidden rows with which verified rows enter the bundle's tapped layers. The first ``num_prompt`` rows are
    verified from the start. Where ``num_kept`` is not 0, that many of them are the first rows of the kept session
    ``kept``, which this one takes over.
    """

    session: Count
    capacity: Count
    cancels: bool = True
    is_tapped: bool = False
    num_prompt: Count = 0
    kept: Count = 0
    num_kept: Count = 0


def check_width(hidden: Hidden, hidden_size: int) -> None:
    """Raise ProtocolError where hidden rows have not ``hidden_size`` values; with 0 that is not known, and all pass."""
    if hidden_size and hidden.shape[1] != hidden_size:
        raise ProtocolError(f"hidden rows of {hidden.shape[1]} values came where the model has {hidden_size}")
