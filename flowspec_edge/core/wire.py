"""Messages between nodes. Each field's declaration says what it may be; ``core/codec.py`` checks it as bytes arrive.

No mask travels: stages derive it from the parents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, TypeVar

from msgspec import Meta, Struct

from flowspec_edge.config import RowKind
from flowspec_edge.core.rows import Chunk, Count, Floats, SessionSpec
from flowspec_edge.errors import UNPRINTABLE, ProtocolError, plain_text

PROTOCOL_VERSION = 14

MAX_TEXT = 4096
"""Characters of one text."""
MAX_PROBE_BYTES = 32768
"""The payload of one message that measures a link."""
ROW_BYTES = 12
"""Draft id, parent and token of one row."""

CONTROL, DATA = "control", "data"

MAX_BUNDLES = 512
"""Bundles that one node may have; their digests fill half a message."""
MAX_CORES = 1024
"""Cores of a machine that a node may name, as many as Linux counts in a mask by default (CPU_SETSIZE)."""
MAX_SOURCES = 64
"""Nodes that may be named as sources of weights: four times the largest ring, and 64 names of 60 bytes fit into a
message."""

Text = Annotated[str, Meta(max_length=MAX_TEXT, pattern=rf"\A[^{UNPRINTABLE}]*\Z")]
"""A name or the like: it has no character that a terminal obeys, and a peer that sends one breaks the rules."""
Sentence = Annotated[str, Meta(max_length=MAX_TEXT)]
"""The text of an error, which may quote anything; ``core/codec.py`` escapes it both ways."""
Digest = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
"""A sha256 in hex. It may become a name on a disk."""
Host = Annotated[str, Meta(max_length=255, pattern=rf"\A[^{UNPRINTABLE}\s/\\@?#\[\]]*\Z")]
"""A host's name or address. It becomes part of a URL."""
Port = Annotated[int, Meta(ge=0, lt=2**16)]
Quantity = Annotated[float, Meta(ge=0, le=1e15)]
"""Watts, or the joules of a machine that serves for longer than any does. Infinity and NaN are none."""


class PlainMessage(Struct, frozen=True, tag=True, array_like=True, forbid_unknown_fields=True):
    """A message without a tail."""


class Hello(PlainMessage, frozen=True):
    """First message on every link, from the side that connected. On a data link ``ring`` names ring and hop."""

    node: Text
    version: Text
    protocol: Count
    purpose: Text
    ring: Text


class Welcome(PlainMessage, frozen=True):
    """The answer to Hello: the node's name and version, its free memory, the digests of its bundles, whether it can
    fetch others, whether it keeps keys and values in float16, and, where its board can tell, how hot it is, what it
    takes at present, and what it has taken since the node began.
    """

    node: Text
    version: Text
    free_memory_bytes: Count
    bundles: Annotated[list[Digest], Meta(max_length=MAX_BUNDLES)]
    can_fetch: bool = False
    has_half_cache: bool = False
    temperature_c: Annotated[int, Meta(ge=-100, le=1000)] | None = None
    watts: Quantity | None = None
    joules: Quantity | None = None


class Peers(PlainMessage, frozen=True):
    """Sent in both directions on a fresh control link, by the connecting side first.

    ``port`` is where the sender listens, 0 where it serves nobody. ``addresses`` are those of the peers that it knows,
    each as ``HOST:PORT``.
    """

    port: Count
    addresses: list[Text]


class OpenStage(PlainMessage, frozen=True):
    """Origin to node: serve layers ``[start, stop)`` of a bundle in this ring, and connect to the next hop.

    Chunks come in over the data link of hop ``hop`` and leave over that of ``hop + 1``, which this node opens.
    ``sources`` are nodes from which weights may be fetched (``Source.to_text`` in ``core/weights/fetching.py``). The
    layers run in ``precision``; where it is empty, the node chooses. The stage's hidden rows leave as ``row_kind``.
    """

    ring: Text
    hop: Count
    bundle: Digest
    start: Count
    stop: Count
    next_node: Text
    next_host: Host
    next_port: Port
    sources: Annotated[list[Text], Meta(max_length=MAX_SOURCES)] = []
    precision: Text = ""
    row_kind: RowKind = "float32"


class StageProgress(PlainMessage, frozen=True):
    """Node to origin: of the weights that the stage lacked, ``num_bytes`` of ``total_bytes`` have come."""

    ring: Text
    num_bytes: Count
    total_bytes: Count


class StageOpened(PlainMessage, frozen=True):
    """Node to origin: the layers are loaded, and the next hop is connected. ``fetched_bytes`` came from other nodes.
    ``arithmetic`` describes what decides on the bits of its rows; it is the same on boards of one kind.
    """

    ring: Text
    memory_bytes: Count
    load_ms: Count
    fetched_bytes: Count = 0
    arithmetic: Text = ""


class PrepareLayers(PlainMessage, frozen=True):
    """Origin to node: load layers ``[start, stop)`` of a bundle, and have them stand by while this link is open.

    The fields are those of OpenStage. It is answered by LayersPrepared or StageFailure, and the next one is asked for
    after that.
    """

    bundle: Digest
    start: Count
    stop: Count
    sources: Annotated[list[Text], Meta(max_length=MAX_SOURCES)] = []
    precision: Text = ""


class CancelPreparing(PlainMessage, frozen=True):
    """Origin to node: give up what is being fetched. What is being loaded may still be answered by LayersPrepared."""


class LayersPrepared(PlainMessage, frozen=True):
    """Node to origin: these layers stand by from now on. ``fetched_bytes`` came from other nodes."""

    start: Count
    stop: Count
    memory_bytes: Count
    load_ms: Count
    fetched_bytes: Count = 0


class LayersGivenBack(PlainMessage, frozen=True):
    """Node to origin: these layers no longer stand by. A stage has them, or needs their memory."""

    start: Count
    stop: Count


class OpenSession(PlainMessage, frozen=True):
    """Origin to stage: open this session."""

    spec: SessionSpec


class SessionOpened(PlainMessage, frozen=True):
    """Stage to origin: the session has its cache, and in it ``num_kept`` rows of the session that it takes over."""

    session: Count
    num_kept: Count = 0


class AdvanceSession(PlainMessage, frozen=True):
    """Origin to every stage, directly: the token after row ``at`` is ``to``."""

    session: Count
    at: Count
    to: Count


class BeginTurn(PlainMessage, frozen=True):
    """Origin to every stage, directly: chunks of this turn may run."""

    session: Count
    turn: Count


class CloseSession(PlainMessage, frozen=True):
    """Origin to stage: the session has ended. Free its cache, or keep its committed rows for another session. The cache
    of a kept one is freed by another such message.
    """

    session: Count
    is_kept: bool = False


class StageFailure(PlainMessage, frozen=True):
    """Node to origin: this stage cannot go on; ``reason`` is a sentence for the user. ``neighbour`` is the node that it
    lost, or could not reach, where that is why.
    """

    reason: Sentence
    neighbour: Text = ""

    @property
    def plain(self) -> StageFailure:
        """The same with a reason that can be shown, and is no longer than a message may be."""
        return StageFailure(plain_text(self.reason)[:MAX_TEXT], self.neighbour)


class SessionFailure(PlainMessage, frozen=True):
    """Node to origin: this stage cannot go on with one session, and has ended it; ``reason`` is a sentence for the
    user. Other sessions go on.
    """

    session: Count
    reason: Sentence

    @property
    def plain(self) -> SessionFailure:
        """The same with a reason that can be shown, and is no longer than a message may be."""
        return SessionFailure(self.session, plain_text(self.reason)[:MAX_TEXT])


class PacketsSent(PlainMessage, frozen=True):
    """Stage to origin, now and then while chunks flow: how many packets its system has sent over its data links since
    the last such message, to the neighbour ahead and to the one behind, and how many of these were lost.
    """

    num_ahead: Count
    num_lost_ahead: Count
    num_behind: Count
    num_lost_behind: Count


class EnergyTaken(PlainMessage, frozen=True):
    """Stage to origin, twice a second where its board can tell: what the board has taken since the node began, and
    takes at present. Nodes of one machine tell the same ``machine``.
    """

    machine: Text
    joules: Quantity
    watts: Quantity


class MeasureLayers(PlainMessage, frozen=True):
    """Origin to node, before a plan: asks for the time of a layer of this bundle, in the precision that the node would
    choose, or in each precision that it can run.
    """

    bundle: Digest
    is_any_precision: bool = False


class LayersMeasured(PlainMessage, frozen=True):
    """Node to origin: a curve per precision (``core/planning/measured.py``), none where it has no layers to measure.

    A board that is hot, or slower than its curve for another reason, takes ``slowdown_permille`` thousandths of the
    time that its curve says. Stages run with ``num_threads`` on these ``cores``; nodes that share them tell the same
    ``machine``, and a node that shares them with none may leave that empty.
    """

    curves: list[Text]
    slowdown_permille: Count = 1000
    machine: Text = ""
    cores: Annotated[list[Count], Meta(max_length=MAX_CORES)] = []
    num_threads: Annotated[int, Meta(ge=1, le=MAX_CORES)] = 1


class MeasureLink(PlainMessage, frozen=True):
    """Origin to node, before a plan: how long does a message take from there to that peer?"""

    node: Text
    host: Host
    port: Port


class LinkMeasured(PlainMessage, frozen=True):
    """Node to origin: one way's latency, and the rate; 0 where the wire was quicker than could be measured."""

    latency_ns: Count
    bytes_per_s: Count


class Probe(PlainMessage, frozen=True):
    """Node to node: bytes to measure a link with. The receiver of one that ``is_answered`` says how many have come."""

    payload: Annotated[bytes, Meta(max_length=MAX_PROBE_BYTES)]
    is_answered: bool


class ProbeAnswer(PlainMessage, frozen=True):
    """How many bytes of probes have come on this link."""

    num_bytes: Count


class Credit(PlainMessage, frozen=True):
    """Backwards on a data link: the receiver has room for ``num_chunks`` more chunks."""

    num_chunks: Count


@dataclass(frozen=True, slots=True)
class ChunkMessage:
    """One chunk on one hop. ``number`` counts the chunks of this hop from 0: a gap means that something was lost."""

    number: int
    chunk: Chunk


@dataclass(frozen=True, slots=True, eq=False)
class TappedRows:
    """Stage to origin, directly: the rows [ids, hidden_size] float32 with which verified rows entered ``layer``."""

    session: int
    layer: int
    ids: tuple[int, ...]
    hidden: Floats


Plain = (
    Hello
    | Welcome
    | Peers
    | OpenStage
    | StageProgress
    | StageOpened
    | PrepareLayers
    | CancelPreparing
    | LayersPrepared
    | LayersGivenBack
    | OpenSession
    | SessionOpened
    | AdvanceSession
    | BeginTurn
    | CloseSession
    | StageFailure
    | SessionFailure
    | PacketsSent
    | EnergyTaken
    | MeasureLayers
    | LayersMeasured
    | MeasureLink
    | LinkMeasured
    | Probe
    | ProbeAnswer
    | Credit
)
Message = Plain | ChunkMessage | TappedRows

_Kind = TypeVar("_Kind", bound=Message)


def expect(message: Message, kind: type[_Kind], peer: str) -> _Kind:
    """The message, which must be of this kind. Raises ProtocolError, which names ``peer``, where it is another one."""
    if not isinstance(message, kind):
        raise ProtocolError(f"peer {peer}: {type(message).__name__} came where {kind.__name__} was expected")
    return message
