"""Run a core again on what it was once told: ``python -m flowspec_edge.bench.replay FILE``.

Nodes write such files where ``FLOWSPEC_RECORD`` names a directory (see core/journal.py). Each event is printed with the
actions that the core of this version answers, and where these are not the ones that were recorded, both.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from flowspec_edge import config
from flowspec_edge.core import events, line, rows
from flowspec_edge.core.cluster import address, membership
from flowspec_edge.core.journal import MAX_BYTES, Core, PlainWriter, type_name
from flowspec_edge.core.planning import losses, preparing, rebalancing, recovery
from flowspec_edge.core.speculation import drafting, generation, origin, prefill, stage
from flowspec_edge.core.weights import fetching
from flowspec_edge.errors import FlowspecError, JournalError

TYPES: dict[str, type[Any]] = {
    type_name(kind): kind
    for module in (
        config,
        events,
        line,
        rows,
        address,
        membership,
        losses,
        preparing,
        rebalancing,
        recovery,
        drafting,
        generation,
        prefill,
        fetching,
    )
    for kind in vars(module).values()
    if isinstance(kind, type) and kind.__module__ == module.__name__
}
"""What events, actions and arguments are made of."""


def _begun_fetch(**arguments: Any) -> fetching.Fetch:
    fetch = fetching.Fetch(**arguments)
    fetch.begin()
    return fetch


CORES: dict[str, Callable[..., Core[Any, Any]]] = {
    "origin": origin.Origin,
    "stage": stage.Stage,
    "membership": membership.Membership,
    "rebalancing": rebalancing.Rebalancing,
    "losses": losses.Losses,
    "recovery": recovery.Recovery,
    "preparing": preparing.Preparing,
    "fetch": _begun_fetch,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One event with the time at which it was handled, and the actions as they were written down."""

    now: float
    event: Any
    told: Any
    actions: Any


@dataclasses.dataclass(slots=True)
class RecordedCore:
    """A journal that is read. ``arguments`` are those of the core's constructor."""

    kind: str
    has_text: bool
    arguments: dict[str, Any]
    entries: Iterator[Entry]
    is_full: bool = False
    """Whether it reached MAX_BYTES; known once the entries are read."""


def read_journal(data: bytes) -> RecordedCore:
    """Read a journal, which may be cut off. Raises JournalError where the bytes are no journal of this version."""
    unpacker = msgpack.Unpacker(use_list=False, strict_map_key=False, max_buffer_size=2 * MAX_BYTES)
    unpacker.feed(data)
    try:
        head = next(unpacker)
        recorded = RecordedCore(str(head["kind"]), bool(head["has_text"]), dict(_made(head["arguments"])), iter(()))
    except (ValueError, LookupError, TypeError, StopIteration, msgpack.UnpackException) as cause:
        raise JournalError(f"not a journal of this version ({cause!r:.80})") from cause

    def entries() -> Iterator[Entry]:
        try:
            for value in unpacker:
                if value == "full":
                    recorded.is_full = True
                    return
                now, told, actions = value
                yield Entry(now, _made(told), told, actions)
        except (ValueError, LookupError, TypeError, msgpack.UnpackException) as cause:
            raise JournalError(f"an entry that cannot be read ({cause!r:.80})") from cause

    recorded.entries = entries()
    return recorded


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One entry run again: what the core answers now, and what it answered then.

    ``now`` is what was read of the clock.
    """

    now: float
    event: str
    actions: Any
    recorded: Any

    @property
    def is_same(self) -> bool:
        return bool(self.actions == self.recorded)


def replay(recorded: RecordedCore) -> Iterator[Step]:
    """Run the core on each event of the journal.

    Raises:
        JournalError: the journal cannot be read, or has not what this core needs.
    """
    if recorded.kind not in CORES:
        raise JournalError(f"a journal of {recorded.kind!r:.40}; known are {', '.join(CORES)}")
    if recorded.kind == "origin" and not recorded.has_text:
        raise JournalError(
            "the origin needs draws and drafts to run again, and this journal was written without text; record once "
            "more with FLOWSPEC_RECORD_TEXT=1, or read what was recorded with --as-recorded"
        )
    try:
        core = CORES[recorded.kind](**recorded.arguments)
    except (TypeError, FlowspecError) as cause:
        raise JournalError(f"its {recorded.kind} was made otherwise than this version's ({cause})") from cause
    writer = PlainWriter(has_text=True)  # what was to be left out of the events is left out already
    for entry in recorded.entries:
        try:
            answer: Any = writer.plain(core.handle(entry.event, entry.now))
        except FlowspecError as error:
            answer = [type(error).__name__, str(error)]
        yield Step(entry.now, summary(entry.told), _as_read(answer), entry.actions)


def _as_read(plain: Any) -> Any:
    """As it looks after it was written and read."""
    return msgpack.unpackb(msgpack.packb(plain), use_list=False, strict_map_key=False)


def summary(plain: Any) -> str:
    """A value as it is read by people: types with their fields, arrays by their shape."""
    if not isinstance(plain, tuple):
        return repr(plain)
    match plain:
        case ("=array", dtype, shape, _):
            return f"{np.dtype(dtype)}{list(shape)}"
        case ("=set", parts):
            return "{" + ", ".join(map(summary, parts)) + "}"
        case ("=map", parts):
            return "{" + ", ".join(f"{summary(key)}: {summary(part)}" for key, part in parts) + "}"
        case ("=seq", parts):
            return "[" + ", ".join(map(summary, parts)) + "]"
    name, *fields = plain
    return f"{str(name).rpartition('.')[2]}({', '.join(map(summary, fields))})"


def _made(value: Any) -> Any:
    """The other way round. Shapes without values become arrays of zeros."""
    if not isinstance(value, tuple):
        return value
    match value:
        case ("=array", dtype, shape, None):
            return np.zeros(shape, np.dtype(dtype))
        case ("=array", dtype, shape, data):
            return np.frombuffer(data, np.dtype(dtype)).reshape(shape)
        case ("=set", parts):
            return frozenset(map(_made, parts))
        case ("=map", parts):
            return {_made(key): _made(part) for key, part in parts}
        case ("=seq", parts):
            return tuple(map(_made, parts))
    name, *fields = value
    kind = TYPES[name]
    made = [_made(field) for field in fields]
    if dataclasses.is_dataclass(kind):  # some take their fields by name alone
        names = [field.name for field in dataclasses.fields(kind)]
        return kind(**dict(zip(names, made, strict=True)))
    return kind(*made)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns an exit status: 0 where all actions are as recorded, 1 where one differs or the file is unusable."""
    parser = argparse.ArgumentParser(prog="python -m flowspec_edge.bench.replay", description=__doc__.split("\n\n")[1])
    parser.add_argument("file", type=Path, metavar="FILE", help="a journal, as FLOWSPEC_RECORD=DIR writes them")
    parser.add_argument(
        "--as-recorded", action="store_true", help="run nothing: print the events and actions of the file"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per event")
    options = parser.parse_args(arguments)
    try:
        recorded = read_journal(options.file.read_bytes())
        steps = _as_recorded(recorded) if options.as_recorded else replay(recorded)
        num_steps = num_other = 0
        for step in steps:
            num_steps += 1
            num_other += not step.is_same
            _print_step(step, is_json=options.json)
    except (OSError, JournalError) as error:
        print(f"replay: {options.file}: {error}", file=sys.stderr)
        return 1
    if not options.json:
        end = "; it was full then, and what came later is not in it" if recorded.is_full else ""
        same = "as recorded" if options.as_recorded else f"{num_other} answered otherwise than recorded"
        print(f"{recorded.kind}: {num_steps} events, {same}{end}")
    return 1 if num_other else 0


def _as_recorded(recorded: RecordedCore) -> Iterator[Step]:
    for entry in recorded.entries:
        yield Step(entry.now, summary(entry.told), entry.actions, entry.actions)


def _print_step(step: Step, *, is_json: bool) -> None:
    actions, recorded = _lines(step.actions), _lines(step.recorded)
    if is_json:
        report = {"now": step.now, "event": step.event, "actions": actions}
        print(json.dumps(report if step.is_same else {**report, "recorded": recorded}))
        return
    print(f"{step.now:.6f}  {step.event}")
    for action in actions:
        print(f"    {action}")
    if not step.is_same:
        print("  recorded were:")
        for line in recorded:
            print(f"    {line}")


def _lines(actions: Any) -> list[str]:
    """One per action; of an error its type and text."""
    return [summary(action) for action in actions[1]] if actions[0] == "=seq" else [f"{actions[0]}: {actions[1]}"]


if __name__ == "__main__":
    sys.exit(main())
