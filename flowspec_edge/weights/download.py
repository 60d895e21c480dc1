"""Fetching weights over HTTP: performs what ``core/weights/fetching.py`` decides. The other end is ``server.py``."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp
import msgspec

from flowspec_edge.core.events import DeadlinePassed
from flowspec_edge.core.journal import Journal
from flowspec_edge.core.weights import fetching as fe
from flowspec_edge.errors import FetchError, FlowspecError, plain_text, system_words
from flowspec_edge.files import open_record
from flowspec_edge.manifest import MAX_MANIFEST_BYTES
from flowspec_edge.weights.part import Part
from flowspec_edge.weights.server import READ_BYTES, STALL_S

CONNECT_S = 5.0
MAX_ANSWER_BYTES = 2**20
"""An answer about MAX_QUESTIONS files takes 280 KB."""

MAX_QUOTED = 300
"""Characters of an error that quotes a source."""

OnProgress = Callable[[int], None]
"""Told how many bytes came, each time that some came."""

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FetchReport:
    """What a fetch brought: bytes by source, and what the sources were accused of."""

    num_bytes: dict[fe.Source, int]
    accusations: list[str]


async def fetch_files(
    files: Sequence[fe.WantedFile],
    sources: Sequence[fe.Source],
    parts: Mapping[str, Part],
    *,
    on_progress: OnProgress = lambda num_bytes: None,
    tls: ssl.SSLContext | None = None,
    max_bytes_per_s: float | None = None,
) -> FetchReport:
    """Fetch files into their parts, by sha256, from the sources that have them; see ``core/weights/fetching.py``.

    All sources together bring ``max_bytes_per_s`` at most, where that is given.

    Raises:
        FetchError: a file cannot be fetched; the text has the reason of every source.
        CacheError: a file cannot be written.
    """
    async with _open_session(tls) as session:
        fetch, is_encrypted = fe.Fetch(files, sources), tls is not None
        return await _Fetcher(session, fetch, parts, on_progress, is_encrypted, max_bytes_per_s).run()


async def fetch_manifest(digest: str, sources: Sequence[fe.Source], *, tls: ssl.SSLContext | None = None) -> str:
    """The text of a bundle's manifest, from the first source that has it.

    Raises:
        FetchError: no source has it; the text has the reason of each.
    """
    reasons = []
    async with _open_session(tls) as session:
        for source in sources:
            try:
                async with asyncio.timeout(STALL_S), session.get(_url(source, digest, tls is not None)) as response:
                    data = await _read_answer(response, MAX_MANIFEST_BYTES)
                if hashlib.sha256(data).hexdigest() == digest:
                    return data.decode()  # UnicodeDecodeError is a ValueError
                reasons.append(f"{source} sent something else under that name")
            except (OSError, aiohttp.ClientError, ValueError, _RuleBrokenError) as cause:
                reasons.append(f"{source} {_describe(cause)}")
    raise FetchError(
        f"the manifest of bundle {digest[:12]} cannot be fetched: {'; '.join(reasons) or 'no node has it'}"
    )


async def _read_answer(response: aiohttp.ClientResponse, limit_bytes: int) -> bytes:
    if response.status != 200:
        raise _RuleBrokenError(f"answered {response.status} {response.reason}")
    data = bytearray()
    async for piece in response.content.iter_any():
        data += piece
        if len(data) > limit_bytes:
            raise _RuleBrokenError(f"sent an answer of more than {limit_bytes} bytes")
    return bytes(data)


class _RuleBrokenError(Exception):
    """A source answered as no node of this project does. The text goes on after the source's name."""


@dataclass(slots=True)
class _Fetcher:
    """Performs the actions of one fetch."""

    session: aiohttp.ClientSession
    fetch: fe.Fetch
    parts: Mapping[str, Part]
    on_progress: OnProgress
    is_encrypted: bool
    max_bytes_per_s: float | None = None
    _may_read_at: float = 0.0  # where the rate is bounded
    _events: asyncio.Queue[fe.FetchEvent | FlowspecError] = field(default_factory=asyncio.Queue)
    _num_bytes: dict[fe.Source, int] = field(default_factory=dict)
    _accusations: list[str] = field(default_factory=list)
    _executor: ThreadPoolExecutor = field(init=False)

    async def run(self) -> FetchReport:
        self._executor = ThreadPoolExecutor(fe.TRANSFERS_PER_SOURCE, thread_name_prefix="fetch")
        try:
            async with asyncio.TaskGroup() as group:
                tasks: list[asyncio.Task[None]] = []
                error = await self._drive(group, tasks)
                for task in tasks:
                    task.cancel()
        finally:
            self._executor.shutdown()  # idle: every task has waited for its thread
        if error is not None:
            raise error.again()
        return FetchReport(self._num_bytes, self._accusations)

    async def _drive(self, group: asyncio.TaskGroup, tasks: list[asyncio.Task[None]]) -> FlowspecError | None:
        """Perform actions until the fetch is over; returns the error that ended it, or None where it is complete."""
        told = {"files": self.fetch.files, "sources": self.fetch.sources}
        journal = Journal("fetch", told, open_record("fetch"))
        actions = self.fetch.begin()
        while True:
            for action in actions:
                match action:
                    case fe.AskSource():
                        tasks.append(group.create_task(self._ask(action), name=f"ask {action.source}"))
                    case fe.StartTransfer():
                        tasks.append(group.create_task(self._transfer(action), name=f"fetch {action.sha256[:12]}"))
                    case fe.DropPart(sha256):
                        await self._in_thread(self.parts[sha256].drop)
                    case fe.AccuseSource(source, reason):
                        self._accusations.append(f"{source} {reason}")
                        _log.warning("%s %s; look after that node: its disk or memory may be failing", source, reason)
                    case fe.CompleteFetch():
                        return None
                    case fe.FailFetch(reason):
                        return FetchError(reason)
            event = await self._next_event()
            if isinstance(event, FlowspecError):
                return event
            actions = journal.handle(self.fetch, event, time.monotonic())

    async def _next_event(self) -> fe.FetchEvent | FlowspecError:
        deadline = self.fetch.next_deadline()
        try:
            async with asyncio.timeout(None if deadline is None else max(deadline - time.monotonic(), 0)):
                return await self._events.get()
        except TimeoutError:
            return DeadlinePassed()

    async def _ask(self, action: fe.AskSource) -> None:
        source = action.source
        url = f"{_origin_of(source, self.is_encrypted)}/weights/have"
        try:
            async with asyncio.timeout(STALL_S), self.session.post(url, data=json.dumps(action.files)) as response:
                held = msgspec.json.decode(await _read_answer(response, MAX_ANSWER_BYTES), type=list[str])
            if len(held) > len(action.files) or not set(action.files).issuperset(held):
                raise _RuleBrokenError("said that it has what nobody asked for")
        except (OSError, aiohttp.ClientError, ValueError, msgspec.DecodeError, _RuleBrokenError) as cause:
            self._events.put_nowait(fe.SourceLost(source, _describe(cause)))
        else:
            self._events.put_nowait(fe.SourceAnswered(source, frozenset(held)))

    async def _transfer(self, action: fe.StartTransfer) -> None:
        sha256, source, part = action.sha256, action.source, self.parts[action.sha256]
        try:
            await self._receive(action, part)
            found = await self._in_thread(part.finish)
            is_right = found == sha256
            self._events.put_nowait(
                fe.FileArrived(sha256, source) if is_right else fe.FileDiffered(sha256, source, found)
            )
        except (OSError, aiohttp.ClientError, ValueError, _RuleBrokenError) as cause:
            is_fault = isinstance(cause, _RuleBrokenError)
            self._events.put_nowait(
                fe.TransferBroke(sha256, source, part.num_bytes, _describe(cause), is_fault=is_fault)
            )
        except FlowspecError as cause:
            self._events.put_nowait(cause)

    async def _receive(self, action: fe.StartTransfer, part: Part) -> None:
        wanted = next(file for file in self.fetch.files if file.sha256 == action.sha256)
        headers = {"Range": f"bytes={action.offset}-"}
        url = _url(action.source, action.sha256, self.is_encrypted)
        async with self.session.get(url, headers=headers, allow_redirects=False) as response:
            _check_response(response, wanted, action.offset)
            gathered = bytearray()
            try:
                async for piece in response.content.iter_any():
                    gathered += piece
                    if len(gathered) >= READ_BYTES:
                        whole, gathered = gathered, bytearray()
                        await self._take(action.source, part, whole)
                        await self._keep_to_rate(len(whole))
            finally:  # bytes that came before the transfer broke are kept
                await self._take(action.source, part, gathered)

    async def _take(self, source: fe.Source, part: Part, data: bytearray) -> None:
        await self._in_thread(part.write, data)
        self._num_bytes[source] = self._num_bytes.get(source, 0) + len(data)
        self.on_progress(len(data))

    async def _keep_to_rate(self, num_bytes: int) -> None:
        """Read no further until so many bytes were allowed to come; the sender waits then too."""
        if self.max_bytes_per_s is not None:
            now = time.monotonic()
            self._may_read_at = max(self._may_read_at, now) + num_bytes / self.max_bytes_per_s
            await asyncio.sleep(self._may_read_at - now)

    async def _in_thread(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """Run in the executor. When cancelled, wait for the thread: nobody may close a part while it is written."""
        future = asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait({future})
            raise


def _check_response(response: aiohttp.ClientResponse, wanted: fe.WantedFile, offset: int) -> None:
    if response.status in (404, 503):  # evicted meanwhile, or busy: another try may succeed
        raise aiohttp.ClientPayloadError(f"answered {response.status} {response.reason}")
    range_ = f"bytes {offset}-{wanted.num_bytes - 1}/{wanted.num_bytes}"
    if response.status != 206 or response.headers.get("Content-Range") != range_:
        found = f"{response.status} {response.headers.get('Content-Range', '')}".strip()
        raise _RuleBrokenError(f"answered {found} where {range_} of {wanted.name} was expected")
    if response.content_length != wanted.num_bytes - offset or "Content-Encoding" in response.headers:
        raise _RuleBrokenError(
            f"offers {response.content_length} bytes of {wanted.name}; {wanted.num_bytes - offset} were expected"
        )


def _describe(cause: Exception) -> str:
    """How a source failed; the text goes on after its name. It may quote what the source sent."""
    if isinstance(cause, TimeoutError):  # aiohttp's own timeouts are of this type and a ClientError too
        return f"did not answer within {CONNECT_S:g} s, or stood still for {STALL_S:g} s"
    if isinstance(cause, aiohttp.ClientConnectorError):
        return f"cannot be reached ({system_words(cause)})"
    if isinstance(cause, _RuleBrokenError):
        return plain_text(str(cause)[:MAX_QUOTED])
    if isinstance(cause, ValueError | msgspec.DecodeError) and not isinstance(cause, aiohttp.ClientError):
        return f"sent what is no answer ({plain_text(str(cause)[:MAX_QUOTED])})"
    return f"was lost in the middle ({plain_text(str(cause)[:MAX_QUOTED]) or type(cause).__name__})"


def _open_session(tls: ssl.SSLContext | None) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=True if tls is None else tls, limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=STALL_S),
        read_bufsize=READ_BYTES,
        auto_decompress=False,
    )


def _origin_of(source: fe.Source, is_encrypted: bool) -> str:
    host = f"[{source.host}]" if ":" in source.host else source.host
    return f"{'https' if is_encrypted else 'http'}://{host}:{source.port}"


def _url(source: fe.Source, sha256: str, is_encrypted: bool) -> str:
    return f"{_origin_of(source, is_encrypted)}/weights/{sha256}"
