"""Read first: what the cores are told (events) and what they answer (actions).

``Stage`` (core/speculation/stage.py) serves a layer range; ``Origin`` (core/speculation/origin.py) runs generations.
Each has one method, ``handle(event, now) -> list[Action]``. Whoever drives them - a node on sockets, a test, a virtual
clock - performs the actions; an action that takes time (``RunForward``, ``RunHead``, ``RunDraft``) is answered later by
its event.

Tensors pass through untouched: hidden rows are [rows, hidden_size], in the numbers in which they travel
(core/row_kinds.py). Nothing as long as the vocabulary reaches a core: tokens are drawn where the head runs
(core/speculation/verify.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flowspec_edge.config import GenerateOptions, Grammar, TokenLogprobs
from flowspec_edge.core.rows import Chunk, Hidden, Paths, Placement, Row, SessionSpec, SlotMove
from flowspec_edge.core.rows import Floats as Floats

# ---------------------------------------------------------------------- a stage: events


@dataclass(frozen=True, slots=True)
class SessionRequested:
    """The origin asks for a session."""

    spec: SessionSpec


@dataclass(frozen=True, slots=True)
class ChunkArrived:
    """A chunk came from the hop before."""

    chunk: Chunk


@dataclass(frozen=True, slots=True)
class AdvanceArrived:
    """An Advance came straight from the origin: the token after row ``at`` is ``to``."""

    session: int
    at: int
    to: int


@dataclass(frozen=True, slots=True)
class TurnBegan:
    """The origin says that chunks of this turn may run. Only ``pruned``, ``lockstep`` and ``pipedec`` have turns."""

    session: int
    turn: int


@dataclass(frozen=True, slots=True, eq=False)
class ForwardFinished:
    """The forward that ``RunForward`` asked for has ended, with ``hidden`` rows [rows, hidden_size].

    After a ``CancelForward`` their values do not matter. ``tapped`` has the rows that entered each tapped layer of this
    stage, by layer, if ``RunForward`` asked for them.
    """

    hidden: Hidden
    tapped: Mapping[int, Floats] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CreditArrived:
    """The hop ahead has room for ``num_chunks`` more chunks."""

    num_chunks: int


@dataclass(frozen=True, slots=True)
class SessionEnded:
    """The origin is done with this session, which may be a kept one. Its committed rows are kept where it says so."""

    session: int
    is_kept: bool = False


@dataclass(frozen=True, slots=True)
class LinkPaused:
    """What is sent to the hop ahead would wait here until ``LinkResumed``: its link is busy with earlier bytes."""


@dataclass(frozen=True, slots=True)
class LinkResumed:
    """The link to the hop ahead takes what is sent."""


StageEvent = (
    SessionRequested
    | ChunkArrived
    | AdvanceArrived
    | TurnBegan
    | ForwardFinished
    | CreditArrived
    | SessionEnded
    | LinkPaused
    | LinkResumed
)

# --------------------------------------------------------------------- a stage: actions


@dataclass(frozen=True, slots=True)
class OpenCache:
    """Make a KV cache of ``capacity`` rows, and tell the origin that the session is open.

    Where ``num_kept`` is not 0, it is the cache of the kept session ``kept``, of which that many rows count; the origin
    is told how many there are.
    """

    session: int
    capacity: int
    kept: int = 0
    num_kept: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class RunForward:
    """Run the layers over ``rows``, which are placed in the session's cache. ``is_tapped`` is that of the
    ``SessionSpec``.
    """

    session: int
    rows: tuple[Row, ...]
    hidden: Hidden | None
    placement: Placement
    is_tapped: bool = False


@dataclass(frozen=True, slots=True)
class CancelForward:
    """No row of the running chunk lives any more: end its forward as soon as possible."""

    session: int


@dataclass(frozen=True, slots=True)
class SendChunk:
    """Send the chunk to the hop ahead."""

    chunk: Chunk


@dataclass(frozen=True, slots=True)
class GrantCredit:
    """Tell the hop before that there is room for ``num_chunks`` more chunks."""

    num_chunks: int


@dataclass(frozen=True, slots=True, eq=False)
class SendTapped:
    """Send the hidden rows [ids, hidden_size] with which verified rows entered ``layer`` straight to the origin."""

    session: int
    layer: int
    ids: tuple[int, ...]
    hidden: Floats


@dataclass(frozen=True, slots=True)
class KeepCache:
    """Make the ``moves``, and keep the cache of this session, which has ended, for another one to take over.

    The rows that it may want are then in the slots of their positions. It comes behind all forwards of the session.
    """

    session: int
    moves: tuple[SlotMove, ...]


@dataclass(frozen=True, slots=True)
class FreeCache:
    """Free the cache of a session, kept or not."""

    session: int


StageAction = OpenCache | RunForward | CancelForward | SendChunk | GrantCredit | SendTapped | KeepCache | FreeCache

# -------------------------------------------------------------------- the origin: events


@dataclass(frozen=True, slots=True)
class PromptSubmitted:
    """A user asks for a continuation of ``prompt``, a tuple of token ids.

    Its last ``num_written`` tokens are no prompt of the user's, but text that was written elsewhere.
    """

    session: int
    prompt: tuple[int, ...]
    options: GenerateOptions
    num_written: int = 0


@dataclass(frozen=True, slots=True)
class StageReady:
    """The stage of that number has opened its cache for the session, with ``num_kept`` rows of a kept one in it."""

    session: int
    stage: int
    num_kept: int = 0


@dataclass(frozen=True, slots=True)
class ChunkReturned:
    """A chunk came back from the last stage. Its hidden rows are there, and have passed the final norm."""

    chunk: Chunk


@dataclass(frozen=True, slots=True, eq=False)
class TappedArrived:
    """Straight from a stage came the hidden rows [ids, hidden_size] with which verified rows entered ``layer``."""

    session: int
    layer: int
    ids: tuple[int, ...]
    hidden: Floats


@dataclass(frozen=True, slots=True, eq=False)
class HeadFinished:
    """The head has finished: ``tokens`` has the token that is drawn after each of the rows that ``RunHead`` gave it.

    It is None after a row that cannot become text, because the token drawn before it was another one. ``logprobs`` has
    an entry beside each token where the options ask for them. Where they have a grammar, ``forced`` has the tokens that
    must come behind each token. ``refusal`` says why nothing could be drawn, where that is the request's fault.
    """

    tokens: tuple[int | None, ...]
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    forced: tuple[tuple[int, ...], ...] = ()
    refusal: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class DraftFinished:
    """A pass of the drafter has finished. ``tokens`` and ``log_probs``, both [rows, k], are its proposals.

    The first row has the likeliest tokens after the last verified pair, if ``RunDraft`` had any; each further row has
    those after a drafted row. The likeliest come first, and those with minus infinity are none.
    """

    tokens: NDArray[np.int64]
    log_probs: Floats


@dataclass(frozen=True, slots=True)
class DraftsChecked:
    """How many rows of each chain of ``CheckDrafts`` the grammar allows: all before the first that it refuses."""

    session: int
    num_allowed: tuple[int, ...]


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
    | TappedArrived
    | HeadFinished
    | DraftFinished
    | DraftsChecked
    | CreditArrived
    | GenerationCancelled
    | RingLost
    | DeadlinePassed
)

# ------------------------------------------------------------------- the origin: actions


@dataclass(frozen=True, slots=True)
class OpenSessions:
    """Ask every stage and the drafter to open the session, which may take over a kept one."""

    spec: SessionSpec


@dataclass(frozen=True, slots=True)
class BroadcastAdvance:
    """Tell every stage directly: the token after row ``at`` is ``to``."""

    session: int
    at: int
    to: int


@dataclass(frozen=True, slots=True)
class BroadcastTurn:
    """Tell every stage directly: chunks of this turn may run."""

    session: int
    turn: int


@dataclass(frozen=True, slots=True, eq=False)
class RunHead:
    """Compute the logits of the ``hidden`` rows [rows, hidden_size] of these ``rows``, parents before children.

    From the logits draw, as the ``options`` ask, the token at the position behind each row's own one in ``positions``.
    Where the options look back, ``paths`` are those to the rows.
    """

    session: int
    rows: tuple[Row, ...]
    positions: tuple[int, ...]
    hidden: Hidden
    options: GenerateOptions
    paths: Paths | None = None


@dataclass(frozen=True, slots=True, eq=False)
class RunDraft:
    """Run one pass of the drafter, over verified pairs and drafted rows together.

    A pair is a token and the target's hidden row of the position before it; its own position is that of the hidden row.
    The first ``len(hidden)`` rows are verified pairs, a chain that ends at the root. The others are drafted rows: in
    place of the target's hidden row the drafter takes its own output for the parent, which it keeps by the parent's
    draft id from an earlier pass. A row that the drafter has run before is run again in the same slot. Before the pass
    the drafter forgets the ``dropped`` rows.

    ``positions`` is [rows], ``hidden`` is [verified, hidden_size]. Where the drafter taps layers, each row of
    ``hidden`` is the rows of all tapped layers, one after the other. The proposals are ranked by their chance of being
    drawn as the ``options`` ask, or by the drafter's own probabilities where there are none. What the ``grammar`` does
    not allow is no proposal. Where the options look back, ``paths`` are those to the rows after which there are
    proposals.
    """

    session: int
    rows: tuple[Row, ...]
    positions: NDArray[np.int64]
    hidden: Hidden
    dropped: tuple[int, ...]
    options: GenerateOptions | None = None
    paths: Paths | None = None
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True, eq=False)
class CheckDrafts:
    """Tell how much of each of these ``chains`` of tokens the ``grammar`` allows behind the row of its path.

    It takes no place on the compute lane: masks are not needed for it, and rows wait for it that may leave with a root.
    """

    session: int
    grammar: Grammar
    paths: Paths
    chains: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class EmitTokens:
    """These tokens are final. ``logprobs`` has an entry for each where the options ask for them."""

    session: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


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
    """End the text: ``reason`` is ``stop``, ``length``, ``cancelled``, ``failed`` or ``refused``; ``error`` says why of
    the last two.
    """

    session: int
    reason: str
    error: str | None = None


@dataclass(frozen=True, slots=True)
class CloseSessions:
    """Tell every stage and the drafter to free the session's caches, or to keep their verified rows.

    Of these the drafter has taken ``taken``, draft ids in the order of the text.
    """

    session: int
    is_kept: bool = False
    taken: tuple[int, ...] = ()


OriginAction = (
    OpenSessions
    | SendChunk
    | GrantCredit
    | BroadcastAdvance
    | BroadcastTurn
    | RunHead
    | RunDraft
    | CheckDrafts
    | EmitTokens
    | ReportTrip
    | FinishGeneration
    | CloseSessions
)
