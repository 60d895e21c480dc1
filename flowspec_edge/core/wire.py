"""Messages between nodes, and their bytes. Nothing here opens a socket.

A message is a frozen dataclass. On the wire it is one header, msgpack of ``[type, field, ...]``, and for a chunk a tail: the
hidden rows as raw little-endian floats, sent behind the header in pieces (see ``net/link.py``). No mask travels: stages
derive it from the parents. Everything a peer sends is checked here before anyone acts on it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import msgpack
import numpy as np
from numpy.typing import NDArray

from flowspec_edge.core.events import Passage
from flowspec_edge.core.speculation.tree import Row
from flowspec_edge.errors import ProtocolError

PROTOCOL_VERSION = 6

MAX_HEADER_BYTES = 65536
"""A chunk of 512 rows has a header of about 8 KB; nothing else comes near."""
MAX_TAIL_BYTES = 16 * 2**20
"""512 rows of 8192 float32: the largest chunk of the widest model we know."""
MAX_CHUNK_ROWS = 512
MAX_PASSAGES = 256
"""One per stage: twice as many as the deepest model we know has layers."""
MAX_PASSAGE_S = 3600.0
"""Far longer than an origin waits before it takes its ring for lost."""
MAX_TEXT = 4096
MAX_PROBE_BYTES = 32768
"""Of one message that measures a link."""
ROW_BYTES = 12
"""Draft id, parent and token of one row."""

CONTROL, DATA = "control", "data"


@dataclass(frozen=True, slots=True)
class Hello:
    """First message on every link, from the side that connected. On a data link ``ring`` names ring and hop."""

    node: str
    version: str
    protocol: int
    purpose: str
    ring: str


@dataclass(frozen=True, slots=True)
class Welcome:
    """The answer to Hello: who is here, what it may hold (bytes), the digests of the bundles that lie here, and whether it
    can fetch others.
    """

    node: str
    version: str
    free_memory_bytes: int
    bundles: list[str]
    can_fetch: bool = False


@dataclass(frozen=True, slots=True)
class Peers:
    """Both ways on a fresh control link, the connecting side first: the port at which the sender is reached (0: it serves
    nobody), and the addresses, ``HOST:PORT``, of the peers it knows.
    """

    port: int
    addresses: list[str]


@dataclass(frozen=True, slots=True)
class OpenStage:
    """Origin to node: serve layers ``[start, stop)`` of a bundle in this ring, and connect to the next hop.

    Chunks come in over the data link of hop ``hop`` and leave over that of ``hop + 1``, which this node opens. ``sources``
    are nodes that weights may be fetched from (``core/fetching.py``: ``Source.to_text``). ``precision`` is the one to run the
    layers in; where it is empty, the node's own choice.
    """

    ring: str
    hop: int
    bundle: str
    start: int
    stop: int
    next_node: str
    next_host: str
    next_port: int
    sources: list[str] = field(default_factory=list)
    precision: str = ""


@dataclass(frozen=True, slots=True)
class StageProgress:
    """Node to origin: of the weights that were missing for the stage, so many bytes have come."""

    ring: str
    num_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class StageOpened:
    """Node to origin: the layers are loaded and the hop to the next node stands. ``fetched_bytes`` came from other nodes."""

    ring: str
    memory_bytes: int
    load_ms: int
    fetched_bytes: int = 0


@dataclass(frozen=True, slots=True)
class OpenSession:
    """Origin to stage: make a KV cache of ``capacity`` rows for this session. See ``SessionRequested`` in core/events.py."""

    session: int
    capacity: int
    cancels: bool = True
    is_tapped: bool = False
    num_prompt: int = 0


@dataclass(frozen=True, slots=True)
class SessionOpened:
    session: int


@dataclass(frozen=True, slots=True)
class AdvanceSession:
    """Origin to every stage, directly: the token after row ``at`` is ``to``."""

    session: int
    at: int
    to: int


@dataclass(frozen=True, slots=True)
class BeginTurn:
    """Origin to every stage, directly: chunks of this turn may run."""

    session: int
    turn: int


@dataclass(frozen=True, slots=True)
class CloseSession:
    session: int


@dataclass(frozen=True, slots=True)
class StageFailure:
    """Node to origin: this stage cannot go on; ``reason`` is a sentence for the user."""

    reason: str


@dataclass(frozen=True, slots=True)
class MeasureLayers:
    """Origin to node, before a plan: what does a layer of this bundle take there, in the precision that the node would choose, or
    in each that it can run?
    """

    bundle: str
    is_any_precision: bool = False


@dataclass(frozen=True, slots=True)
class LayersMeasured:
    """Node to origin: ``curves`` by precision (``core/measured.py``), none where the node has no layers to measure with.

    A board that is hot, or slower than its curve for another reason, takes ``slowdown_permille`` thousandths of its curve.
    """

    curves: list[str]
    slowdown_permille: int = 1000


@dataclass(frozen=True, slots=True)
class MeasureLink:
    """Origin to node, before a plan: how long does a message take from there to that peer?"""

    node: str
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class LinkMeasured:
    """Node to origin: one way's latency, and the rate; 0 where the wire was quicker than could be measured."""

    latency_ns: int
    bytes_per_s: int


@dataclass(frozen=True, slots=True)
class Probe:
    """Node to node: bytes to measure a link with. Whoever gets one that ``is_answered`` says how many have come."""

    payload: bytes
    is_answered: bool


@dataclass(frozen=True, slots=True)
class ProbeAnswer:
    """How many bytes of probes have come on this link."""

    num_bytes: int


@dataclass(frozen=True, slots=True)
class Credit:
    """Backwards on a data link: the receiver has room for ``num_chunks`` more."""

    num_chunks: int


@dataclass(frozen=True, slots=True, eq=False)
class ChunkMessage:
    """One chunk on one hop. ``hidden`` is [rows, hidden_size] float32, or None on the hop to the first stage.

    ``number`` counts the chunks of this hop from 0: a gap means that something was lost. ``num_wanted`` is how many of
    the last rows the origin needs hidden rows of. ``turn`` and ``passages`` are those of ``core/events.py``.
    """

    number: int
    session: int
    rows: tuple[Row, ...]
    num_wanted: int
    hidden: NDArray[np.float32] | None
    turn: int = 0
    passages: tuple[Passage, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class TappedRows:
    """Stage to origin, directly: hidden rows of verified rows as they entered ``layer``, [ids, hidden_size] float32."""

    session: int
    layer: int
    ids: tuple[int, ...]
    hidden: NDArray[np.float32]


Message = (
    Hello
    | Welcome
    | Peers
    | OpenStage
    | StageProgress
    | StageOpened
    | OpenSession
    | SessionOpened
    | AdvanceSession
    | BeginTurn
    | CloseSession
    | StageFailure
    | MeasureLayers
    | LayersMeasured
    | MeasureLink
    | LinkMeasured
    | Probe
    | ProbeAnswer
    | Credit
    | ChunkMessage
    | TappedRows
)

_PLAIN: tuple[type[Any], ...] = (
    Hello,
    Welcome,
    Peers,
    OpenStage,
    StageProgress,
    StageOpened,
    OpenSession,
    SessionOpened,
    AdvanceSession,
    BeginTurn,
    CloseSession,
    StageFailure,
    MeasureLayers,
    LayersMeasured,
    MeasureLink,
    LinkMeasured,
    Probe,
    ProbeAnswer,
    Credit,
)
_BY_NAME: dict[str, type[Any]] = {kind.__name__: kind for kind in _PLAIN}
_CHECKS: dict[Any, Callable[[Any], bool]] = {
    str: lambda value: isinstance(value, str) and len(value) <= MAX_TEXT,
    int: lambda value: type(value) is int and 0 <= value < 2**63,
    bool: lambda value: type(value) is bool,
    bytes: lambda value: type(value) is bytes and len(value) <= MAX_PROBE_BYTES,
    list[str]: lambda value: isinstance(value, list) and all(isinstance(v, str) and len(v) <= MAX_TEXT for v in value),
}
_FIELDS: dict[type[Any], list[tuple[str, Any]]] = {
    kind: [(name, get_type_hints(kind)[name]) for name in (field.name for field in dataclasses.fields(kind))]
    for kind in _PLAIN
}
_U32 = np.dtype("<u4")
_F32 = np.dtype("<f4")


def encode(message: Message) -> tuple[bytes, memoryview | None]:
    """The header's bytes, and the tail as a flat view of bytes where the message has one."""
    if isinstance(message, TappedRows):
        ids = np.array(message.ids, _U32).tobytes()
        header = msgpack.packb(["Tapped", message.session, message.layer, ids, message.hidden.shape[1]])
        return header, _tail_of(message.hidden)
    if not isinstance(message, ChunkMessage):
        values = [getattr(message, name) for name, _ in _FIELDS[type(message)]]
        return msgpack.packb([type(message).__name__, *values]), None
    table = np.array(message.rows, _U32).reshape(-1, 3).T.tobytes()  # ids, then parents, then tokens
    hidden = message.hidden
    width = 0 if hidden is None else hidden.shape[1]
    numbers = (message.number, message.session, message.num_wanted)
    header = msgpack.packb(["Chunk", *numbers, table, width, message.turn, message.passages])
    if hidden is None:
        return header, None
    return header, _tail_of(hidden)


def _tail_of(hidden: NDArray[np.float32]) -> memoryview:
    if sys.byteorder == "big" or hidden.dtype != _F32 or not hidden.flags.c_contiguous:
        hidden = np.ascontiguousarray(hidden, _F32)
    return hidden.data.cast("B")


def num_tail_bytes(header: bytes) -> int:
    """How many bytes follow this header. Raises ProtocolError where that breaks a limit."""
    values = _unpack(header)
    if values[0] not in ("Chunk", "Tapped"):
        return 0
    num_rows, width = _chunk_shape(values) if values[0] == "Chunk" else _tapped_shape(values)
    num_bytes = num_rows * width * _F32.itemsize
    if num_bytes > MAX_TAIL_BYTES:
        raise ProtocolError(f"a chunk of {num_bytes} bytes exceeds the {MAX_TAIL_BYTES}-byte limit (MAX_TAIL_BYTES)")
    return num_bytes


def decode(header: bytes, tail: bytes | bytearray | memoryview | None = None) -> Message:
    """A checked message from its bytes.

    Raises:
        ProtocolError: not msgpack, an unknown type, a field of the wrong kind, or a tail of the wrong length.
    """
    values = _unpack(header)
    name = values[0]
    if name == "Chunk":
        return _decode_chunk(values, tail)
    if name == "Tapped":
        return _decode_tapped(values, tail)
    kind = _BY_NAME.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ProtocolError(f"a message of unknown type {name!r:.80}; does the peer run another version?")
    fields = _FIELDS[kind]
    if len(values) != len(fields) + 1:
        raise ProtocolError(f"{name} with {len(values) - 1} fields instead of {len(fields)}")
    for (name_of_field, hint), value in zip(fields, values[1:], strict=True):
        if not _CHECKS[hint](value):
            raise ProtocolError(
                f"{name}.{name_of_field} is {value!r:.80}, not a valid {getattr(hint, '__name__', hint)}"
            )
    message: Message = kind(*values[1:])
    return message


def _unpack(header: bytes) -> list[Any]:
    if len(header) > MAX_HEADER_BYTES:
        raise ProtocolError(
            f"a header of {len(header)} bytes exceeds the {MAX_HEADER_BYTES}-byte limit (MAX_HEADER_BYTES)"
        )
    try:
        values = msgpack.unpackb(header)
    except (ValueError, msgpack.UnpackException) as cause:
        raise ProtocolError(f"a header that is not msgpack ({cause})") from cause
    if not isinstance(values, list) or not values:
        raise ProtocolError("a header that is not a list of a type and its fields")
    return values


def _chunk_shape(values: list[Any]) -> tuple[int, int]:
    if len(values) != 8 or not isinstance(values[4], bytes) or not all(type(values[i]) is int for i in (1, 2, 3, 5)):
        raise ProtocolError("a chunk header with wrong fields")
    num_rows, remainder = divmod(len(values[4]), 3 * _U32.itemsize)
    if remainder or not 0 < num_rows <= MAX_CHUNK_ROWS:
        raise ProtocolError(f"a chunk of {num_rows} rows; between 1 and {MAX_CHUNK_ROWS} are allowed (MAX_CHUNK_ROWS)")
    if values[5] < 0 or not 0 <= values[3] <= num_rows:
        raise ProtocolError(f"a chunk of {num_rows} rows wants {values[3]} back, of width {values[5]}")
    return num_rows, values[5]


def _decode_chunk(values: list[Any], tail: bytes | bytearray | memoryview | None) -> ChunkMessage:
    num_rows, width = _chunk_shape(values)
    found = 0 if tail is None else len(tail)
    if found != num_rows * width * _F32.itemsize:
        raise ProtocolError(f"a chunk of {num_rows} rows of {width} floats with a tail of {found} bytes")
    hidden = None if tail is None or not width else np.frombuffer(tail, _F32).reshape(num_rows, width)
    ids, parents, tokens = np.frombuffer(values[4], _U32).reshape(3, num_rows).tolist()
    rows = tuple(Row(*row) for row in zip(ids, parents, tokens, strict=True))
    if not _CHECKS[int](values[6]):
        raise ProtocolError(f"a chunk's turn is {values[6]!r:.80}, not a valid int")
    return ChunkMessage(values[1], values[2], rows, values[3], hidden, values[6], _decode_passages(values[7]))


def _tapped_shape(values: list[Any]) -> tuple[int, int]:
    if len(values) != 5 or not isinstance(values[3], bytes) or not all(_CHECKS[int](values[i]) for i in (1, 2, 4)):
        raise ProtocolError("a header of tapped rows with wrong fields")
    num_rows, remainder = divmod(len(values[3]), _U32.itemsize)
    if remainder or not 0 < num_rows <= MAX_CHUNK_ROWS or not values[4]:
        raise ProtocolError(
            f"{num_rows} tapped rows of width {values[4]}; between 1 and {MAX_CHUNK_ROWS} are allowed (MAX_CHUNK_ROWS)"
        )
    return num_rows, values[4]


def _decode_tapped(values: list[Any], tail: bytes | bytearray | memoryview | None) -> TappedRows:
    num_rows, width = _tapped_shape(values)
    found = 0 if tail is None else len(tail)
    if tail is None or found != num_rows * width * _F32.itemsize:
        raise ProtocolError(f"{num_rows} tapped rows of {width} floats with a tail of {found} bytes")
    ids = tuple(np.frombuffer(values[3], _U32).tolist())
    return TappedRows(values[1], values[2], ids, np.frombuffer(tail, _F32).reshape(num_rows, width))


def _decode_passages(values: Any) -> tuple[Passage, ...]:
    if not isinstance(values, list) or len(values) > MAX_PASSAGES:
        raise ProtocolError(
            f"a chunk's passages are {values!r:.80}, not a list of at most {MAX_PASSAGES} (MAX_PASSAGES)"
        )
    for value in values:
        if not isinstance(value, list) or len(value) != 3 or type(value[0]) is not int:
            raise ProtocolError(f"a chunk with the passage {value!r:.80}, not rows and two times")
        if not 0 < value[0] <= MAX_CHUNK_ROWS or not all(_is_time(seconds) for seconds in value[1:]):
            raise ProtocolError(f"a chunk with the passage {value!r:.80}: out of range")
    return tuple(Passage(*value) for value in values)


def _is_time(value: Any) -> bool:
    return type(value) is float and 0 <= value <= MAX_PASSAGE_S
