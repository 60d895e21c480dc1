"""Read first: what the cores are told (events) and what they answer (actions).

``Stage`` (core/stage.py) serves a layer range; ``Origin`` (core/origin.py) runs generations. Each has one method,
``handle(event, now) -> list[Action]``. Whoever drives them - a node on sockets, a test, a virtual clock - performs the
actions; an action that takes time (``RunForward``, ``RunHead``, ``RunDraft``) is answered later by its event.

Tensors pass through untouched: hidden rows are [rows, hidden_size] float32, logits [rows, vocab_size] float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flowspec_edge.config import GenerateOptions
from flowspec_edge.core.kv_slots import SlotMove
from flowspec_edge.core.tree import Row

Floats = NDArray[np.float32]

# ---------------------------------------------------------------------- a stage: events


@dataclass(frozen=True, slots=True)
class SessionRequested:
    """The origin asks for a cache of ``capacity`` rows."""

    session: int
    capacity: int


@dataclass(frozen=True, slots=True, eq=False)
class ChunkArrived:
    """Rows from the hop before; ``hidden`` is None at the first stage, which embeds the tokens."""

    session: int
    rows: tuple[Row, ...]
    num_wanted: int
    hidden: Floats | None


@dataclass(frozen=True, slots=True)
class AdvanceArrived:
    """Straight from the origin: the token after row ``at`` is ``to``."""

    session: int
    at: int
    to: int


@dataclass(frozen=True, slots=True, eq=False)
class ForwardFinished:
    """The layers ran over the chunk that ``RunForward`` named."""

    hidden: Floats


@dataclass(frozen=True, slots=True)
class CreditArrived:
    """The hop ahead has room for ``num_chunks`` more."""

    num_chunks: int


@dataclass(frozen=True, slots=True)
class SessionEnded:
    """The origin is done with this session."""

    session: int


StageEvent = SessionRequested | ChunkArrived | AdvanceArrived | ForwardFinished | CreditArrived | SessionEnded

# --------------------------------------------------------------------- a stage: actions


@dataclass(frozen=True, slots=True)
class OpenCache:
    """Make the KV cache and tell the origin that the session is open."""

    session: int
    capacity: int


@dataclass(frozen=True, slots=True, eq=False)
class RunForward:
    """Run the layers over ``rows``: first move cache rows, then write slots from ``first_slot`` on.

    ``mask`` is [rows, first_slot + rows], True where a row may look; ``positions`` is [rows].
    """

    session: int
    rows: tuple[Row, ...]
    hidden: Floats | None
    moves: tuple[SlotMove, ...]
    first_slot: int
    positions: NDArray[np.int64]
    mask: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class SendChunk:
    """Send rows to the hop ahead; ``hidden`` belongs to them row by row."""

    session: int
    rows: tuple[Row, ...]
    num_wanted: int
    hidden: Floats | None


@dataclass(frozen=True, slots=True)
class GrantCredit:
    """Tell the hop before that there is room for ``num_chunks`` more."""

    num_chunks: int


@dataclass(frozen=True, slots=True)
class FreeCache:
    session: int


StageAction = OpenCache | RunForward | SendChunk | GrantCredit | FreeCache

# -------------------------------------------------------------------- the origin: events


@dataclass(frozen=True, slots=True)
class PromptSubmitted:
    """A user asks for a continuation of ``prompt``, a tuple of token ids."""

    session: int
    prompt: tuple[int, ...]
    options: GenerateOptions


@dataclass(frozen=True, slots=True)
class StageReady:
    """One stage has opened its cache for the session."""

    session: int


@dataclass(frozen=True, slots=True, eq=False)
class ChunkReturned:
    """Hidden rows, normed, from the last stage."""

    session: int
    rows: tuple[Row, ...]
    hidden: Floats


@dataclass(frozen=True, slots=True, eq=False)
class HeadFinished:
    """Logits for the rows that ``RunHead`` named."""

    logits: Floats


@dataclass(frozen=True, slots=True, eq=False)
class DraftFinished:
    """The likeliest next tokens of the rows that ``ExtendDraft`` (its last pair only) or ``ExpandDraft`` named.

    ``tokens`` and ``log_probs`` are [rows, k].
    """

    tokens: NDArray[np.int64]
    log_probs: Floats


@dataclass(frozen=True, slots=True)
class GenerationCancelled:
    """The user has left."""

    session: int


@dataclass(frozen=True, slots=True)
class RingLost:
    """A stage or a link is gone; ``reason`` is a sentence for the user."""

    reason: str


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The time that ``next_deadline()`` named has come."""


OriginEvent = (
    PromptSubmitted
    | StageReady
    | ChunkReturned
    | HeadFinished
    | DraftFinished
    | CreditArrived
    | GenerationCancelled
    | RingLost
    | DeadlinePassed
)

# ------------------------------------------------------------------- the origin: actions


@dataclass(frozen=True, slots=True)
class OpenSessions:
    """Ask every stage for a cache of ``capacity`` rows."""

    session: int
    capacity: int


@dataclass(frozen=True, slots=True)
class BroadcastAdvance:
    """Tell every stage directly: the token after row ``at`` is ``to``."""

    session: int
    at: int
    to: int


@dataclass(frozen=True, slots=True, eq=False)
class RunHead:
    """Logits of these hidden rows, please."""

    session: int
    hidden: Floats


@dataclass(frozen=True, slots=True, eq=False)
class ExtendDraft:
    """Give the drafter verified pairs: the hidden row at each position and the token that followed it.

    Its cache keeps them and forgets everything drafted since the last verified pair. The last pair is the root's.
    """

    session: int
    rows: tuple[Row, ...]
    positions: NDArray[np.int64]
    hidden: Floats


@dataclass(frozen=True, slots=True, eq=False)
class ExpandDraft:
    """One pass of the drafter over drafted rows, whose features it remembers by their parents' draft ids."""

    session: int
    rows: tuple[Row, ...]
    positions: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class EmitTokens:
    """These tokens are final."""

    session: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ReportTrip:
    """What one returned chunk brought, for traces and displays."""

    session: int
    num_returned: int
    num_accepted: int
    num_pruned: int
    num_drafted: int
    num_in_flight: int


@dataclass(frozen=True, slots=True)
class FinishGeneration:
    """The end: ``reason`` is ``stop``, ``length``, ``cancelled`` or ``failed``; ``error`` says why it failed."""

    session: int
    reason: str
    error: str | None = None


@dataclass(frozen=True, slots=True)
class CloseSessions:
    """Tell every stage and the drafter to free the session's caches."""

    session: int


OriginAction = (
    OpenSessions
    | SendChunk
    | GrantCredit
    | BroadcastAdvance
    | RunHead
    | ExtendDraft
    | ExpandDraft
    | EmitTokens
    | ReportTrip
    | FinishGeneration
    | CloseSessions
)
