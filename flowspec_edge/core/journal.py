"""What a core was told, and what it answered: written down so that a bug can be sent, and run again elsewhere.

A journal is a sequence of msgpack values: first the core's kind and constructor arguments, then ``(now, event,
actions)`` for each event that it handled. Of float arrays only the shape is kept: hidden rows pass through the cores
unread, and weights never reach them. Tokens reveal the text, so a journal has them only where it is asked to. Otherwise
a token is its ordinal number under its parent row, which is all that a stage needs; and draws and drafts are left out,
without which an origin cannot be run again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import msgpack
import msgspec
import numpy as np

from flowspec_edge.config import GenerateOptions, Grammar
from flowspec_edge.core import events as ev
from flowspec_edge.core.rows import Paths, Row
from flowspec_edge.errors import FlowspecError

MAX_BYTES = 64 * 2**20
"""Where a journal stops: an SD card has room for it, a bug report too once it is compressed."""

_E = TypeVar("_E", contravariant=True)
_A = TypeVar("_A")
Write = Callable[[bytes], None]


class Core(Protocol[_E, _A]):
    """What all cores have in common."""

    def handle(self, event: _E, now: float) -> list[_A]: ...


_WITH_TEXT = (ev.DraftFinished,)
"""Events whose arrays reveal the text."""
_NO_PATHS = Paths(0, np.zeros(0, np.int64), ())


class Journal:
    """Writes one core's journal; without ``write`` it only passes events on."""

    def __init__(
        self, kind: str, arguments: Mapping[str, Any], write: Write | None = None, *, has_text: bool = False
    ) -> None:
        self._write = write
        self._num_bytes = 0
        self._writer = PlainWriter(has_text=has_text)
        self._put({"kind": kind, "has_text": has_text, "arguments": self._writer.plain(dict(arguments))})

    def handle(self, core: Core[_E, _A], event: _E, now: float) -> list[_A]:
        """Let the core handle the event, and write down what it answers or raises."""
        if self._write is None:
            return core.handle(event, now)
        told = self._writer.plain(event)
        try:
            actions = core.handle(event, now)
        except FlowspecError as error:
            self._put([now, told, [type(error).__name__, str(error)]])
            raise
        self._put([now, told, self._writer.plain(actions)])
        return actions

    def _put(self, value: object) -> None:
        if self._write is None:
            return
        data = msgpack.packb(value)
        self._num_bytes += len(data)
        if self._num_bytes > MAX_BYTES:
            data, write, self._write = msgpack.packb("full"), self._write, None
            write(data)
            return
        self._write(data)


class PlainWriter:
    """Turns values into lists for msgpack: ``[name, field, ...]`` of a type here, ``["=set", ...]`` of a container."""

    def __init__(self, *, has_text: bool) -> None:
        self._has_text = has_text
        self._ordinals: dict[tuple[int, int], dict[int, int]] = {}  # by session and parent, then by token

    def plain(self, value: Any) -> Any:
        """An event, an action, a list of these, or a constructor's arguments."""
        if not self._has_text:
            value = self._without_text(value)
        keeps_values = self._has_text or not isinstance(value, _WITH_TEXT)
        return self._plain(value, keeps_values=keeps_values, keeps_floats=isinstance(value, _WITH_TEXT))

    def _plain(self, value: Any, *, keeps_values: bool = True, keeps_floats: bool = False) -> Any:
        def plain(part: Any) -> Any:
            return self._plain(part, keeps_values=keeps_values, keeps_floats=keeps_floats)

        if isinstance(value, np.ndarray):
            is_kept = keeps_values and (keeps_floats or value.dtype.kind not in "fV")
            return ["=array", value.dtype.str, list(value.shape), value.tobytes() if is_kept else None]
        if isinstance(value, set | frozenset):
            return ["=set", sorted(map(plain, value), key=repr)]
        if isinstance(value, Mapping):
            return ["=map", [[plain(key), plain(part)] for key, part in value.items()]]
        if isinstance(value, list) or type(value) is tuple:
            return ["=seq", [self.plain(part) if dataclasses.is_dataclass(part) else plain(part) for part in value]]
        if isinstance(value, np.generic):
            return value.item()
        if (fields := _fields_of(value)) is not None:
            return [type_name(type(value)), *map(plain, fields)]
        return value

    def _without_text(self, value: Any) -> Any:
        match value:
            case ev.ChunkArrived(chunk) | ev.ChunkReturned(chunk) | ev.SendChunk(chunk):
                kept = dataclasses.replace(chunk, rows=self._rows(chunk.session, chunk.rows))
                return type(value)(kept)
            case ev.RunForward():
                return dataclasses.replace(value, rows=self._rows(value.session, value.rows))
            case ev.RunHead():
                rows, options = self._rows(value.session, value.rows), _without_tokens(value.options)
                return dataclasses.replace(value, rows=rows, options=options, paths=None)
            case ev.RunDraft():
                rows, ranked_by = (
                    self._rows(value.session, value.rows),
                    value.options and _without_tokens(value.options),
                )
                return dataclasses.replace(value, rows=rows, options=ranked_by, paths=None, grammar=None)
            case ev.CheckDrafts():
                chains = tuple((0,) * len(chain) for chain in value.chains)
                return dataclasses.replace(value, grammar=Grammar("", ""), paths=_NO_PATHS, chains=chains)
            case ev.AdvanceArrived(session, at, to) | ev.BroadcastAdvance(session, at, to):
                return dataclasses.replace(value, to=self._ordinal(session, at, to))
            case ev.PromptSubmitted():
                options = _without_tokens(value.options)
                return dataclasses.replace(value, prompt=(0,) * len(value.prompt), options=options)
            case ev.EmitTokens():
                return dataclasses.replace(value, tokens=(0,) * len(value.tokens), logprobs=())
            case ev.HeadFinished():
                return dataclasses.replace(value, tokens=(0,) * len(value.tokens), logprobs=(), forced=())
        return value

    def _rows(self, session: int, found: tuple[Row, ...]) -> tuple[Row, ...]:
        return tuple(row._replace(token=self._ordinal(session, row.parent, row.token)) for row in found)

    def _ordinal(self, session: int, parent: int, token: int) -> int:
        known = self._ordinals.setdefault((session, parent), {})
        return known.setdefault(token, len(known))


def _without_tokens(options: GenerateOptions) -> GenerateOptions:
    return dataclasses.replace(options, stop=(), stop_token_ids=(), logit_bias=(), grammar=None, owner="")


def type_name(kind: type[Any]) -> str:
    """A type's name in journals: the last part of its module's path, a dot, and the name of the type."""
    return f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"


def _fields_of(value: Any) -> tuple[Any, ...] | None:
    if isinstance(value, tuple):  # a NamedTuple
        return value
    if isinstance(value, msgspec.Struct):
        return tuple(getattr(value, name) for name in value.__struct_fields__)
    if dataclasses.is_dataclass(value):
        return tuple(getattr(value, field.name) for field in dataclasses.fields(value))
    return None
