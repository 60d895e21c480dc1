"""An async client for ``flowspec serve``. It speaks HTTP only and imports neither numpy nor ONNX Runtime.

::

    async with Client("http://127.0.0.1:8008") as client:
        answer = client.generate("def add(a, b):", max_new_tokens=64)
        async for piece in answer:
            print(piece.text, end="", flush=True)
        print(answer.statistics)

With ``resume=True`` a text survives the server that writes it: where the connection is lost, the next server goes on
with the very token that would have come, or the same server once it is back.

::

    async with Client("http://pi-kitchen:8008", "http://pi-attic:8008", resume=True) as client:
        answer = await client.complete("def add(a, b):", max_new_tokens=400, temperature=0.8)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import ssl
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import aiohttp

from flowspec_edge.config import GenerateOptions, Piece
from flowspec_edge.core.asked_text import DEFAULT_RETRY_S, AskedText, error_of
from flowspec_edge.core.cluster import reconnection as rc
from flowspec_edge.errors import (
    AnswerLostError,
    FlowspecError,
    LinkLostError,
    NodeUnavailableError,
    OtherKeyError,
    RequestError,
    ServerBusyError,
    StageFailedError,
    system_words,
)

CONNECT_S = 5.0
"""A LAN answers within milliseconds, a busy board within a second."""
SILENCE_S = 10.0
"""After how long a server that says nothing counts as lost, where a text is to survive it. It says something every two
seconds."""
RESUME_S = 120.0
"""How long a text may stand still: a Raspberry Pi that lost its power serves again after less than a minute."""
MAX_EVENT_BYTES = 4 * 2**20
"""The last event of an answer is about a kilobyte. The first one may have the tokens of a long prompt."""


class Answer:
    """One answer, whose pieces are iterated over once; its attributes grow with them.

    Attributes:
        text: the text that has come so far.
        token_ids: the tokens of that text.
        finish_reason: ``stop`` or ``length``, once it has ended.
        statistics: figures of the generation, once it has ended (README, "What the figures mean"). Where it
            was resumed, ``completion_tokens`` counts all tokens, the last server was given the first
            ``resumed_tokens`` of them, and the other figures are of what it wrote itself.
    """

    def __init__(self, pieces: AsyncGenerator[Piece, None]) -> None:
        self._pieces = pieces
        self.text = ""
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.statistics: dict[str, Any] | None = None

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        piece = await anext(self._pieces)
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.finish_reason, self.statistics = piece.finish_reason, piece.statistics
        return piece

    async def aclose(self) -> None:
        """Cancel the generation; the nodes stop working on it."""
        await self._pieces.aclose()


class Client:
    """A client of one ``flowspec serve``, or of several. Leaving the ``async with`` block cancels what still runs.

    A server beyond this machine wants its ``api_key`` (flowspec key show --api, where it serves). The server's
    certificate follows from that key, so with ``https://`` no other server is trusted and no file is needed. Several
    servers need one and the same key (flowspec key set --api).

    With ``resume`` a text does not end with its server. Where the connection breaks, the server is silent for 10 s, or
    says that it cannot go on or is about to end, the next of ``urls`` is asked to go on, and the first one again after
    the last. It gets the tokens of prompt and text, and the seed, and goes on with the token that would have come next;
    not a character comes twice or is left out. Only a server of the same bundle does; where it computes on boards of
    another kind, it goes on as these round. A text may stand still for ``resume_within_s``.
    """

    def __init__(
        self, *urls: str, api_key: str | None = None, resume: bool = False, resume_within_s: float = RESUME_S
    ) -> None:
        self._urls = [url.rstrip("/") for url in urls or ("http://127.0.0.1:8008",)]
        if len(self._urls) > 1 and not resume:
            raise RequestError(f"{len(urls)} servers are given, and only with resume=True the next one is ever asked")
        self._api_key = api_key
        self._resume_within_s = resume_within_s if resume else None
        self._server = 0  # in _urls: the one to ask first, for it wrote the latest piece
        self._session: aiohttp.ClientSession | None = None
        self._answers: weakref.WeakSet[Answer] = weakref.WeakSet()  # nothing is kept of those that nobody holds

    async def __aenter__(self) -> Self:
        silence_s = None if self._resume_within_s is None else SILENCE_S
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=silence_s),
            read_bufsize=MAX_EVENT_BYTES,
            headers={} if self._api_key is None else {"Authorization": f"Bearer {self._api_key.strip()}"},
            connector=aiohttp.TCPConnector(ssl=await self._trust()),
        )
        return self

    async def _trust(self) -> ssl.SSLContext | bool:
        """Whom to trust: the holder of the API key alone, or, without a key, whomever this machine trusts.

        Raises:
            KeyTextError: the API key is mistyped.
        """
        if self._api_key is None or not any(url.startswith("https://") for url in self._urls):
            return True
        from flowspec_edge.net.auth import trust_key

        with ThreadPoolExecutor(1) as thread:
            return await asyncio.get_running_loop().run_in_executor(thread, trust_key, self._api_key)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._session is not None
        for answer in list(self._answers):
            await answer.aclose()
        await self._session.close()

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        schedule: str = "flowspec",
    ) -> Answer:
        """Stream a continuation of ``prompt``; see :class:`GenerateOptions` for the options. Without a ``seed`` the
        server draws one, which the statistics tell.

        The request leaves with the first piece asked for. Iterating raises:

        Raises:
            RequestError: an option is out of range, or the prompt does not fit.
            NodeUnavailableError: nothing answers at the client's URL.
            ServerBusyError: the server has as many texts to write as it takes.
            StageFailedError: the nodes could not go on, or there are none.
            LinkLostError: the server was lost while it answered.
            AnswerLostError: with ``resume``, instead of the four above: no server went on with the text in time.
        """
        options = GenerateOptions(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=tuple((logit_bias or {}).items()),
            seed=seed or 0,
            stop=tuple(stop),
            schedule=schedule,
        )
        within_s = self._resume_within_s
        text = AskedText(prompt, options, seed, is_resumable=within_s is not None)
        pieces = self._ask(self._urls[0], text) if within_s is None else self._ask_until_it_ends(text, within_s)
        answer = Answer(pieces)
        self._answers.add(answer)
        return answer

    async def complete(self, prompt: str, **options: Any) -> Answer:
        """The whole answer at once; takes and raises what :meth:`generate` does."""
        answer = self.generate(prompt, **options)
        async for _ in answer:
            pass
        return answer

    async def _ask_until_it_ends(self, text: AskedText, within_s: float) -> AsyncGenerator[Piece, None]:
        """What one server after the other writes at a text."""
        clock = asyncio.get_running_loop().time
        decisions = rc.Reconnection(len(self._urls), within_s, random.random, self._server)
        until: float | None = None
        while True:
            try:
                async with contextlib.aclosing(self._ask(self._urls[decisions.server], text)) as pieces:
                    while (piece := await _next(pieces, until)) is not None:
                        self._server, until = decisions.server, None
                        decisions.handle(rc.PieceCame(), clock())
                        yield piece
                return
            except FlowspecError as cause:
                if text.has_ended:
                    return
                is_refusal = isinstance(cause, RequestError | OtherKeyError)
                if not text.can_go_on or (is_refusal and not text.token_ids):
                    raise
                wait_s = cause.retry_after_s if isinstance(cause, ServerBusyError) else 0.0
                event = rc.ServerRefused(str(cause)) if is_refusal else rc.ServerLost(str(cause), wait_s)
                (action,) = decisions.handle(event, clock())
                if isinstance(action, rc.GiveUp):
                    raise self._lost(text, action.reasons) from cause
            until = action.until
            await asyncio.sleep(action.at - clock())

    def _lost(self, text: AskedText, reasons: Mapping[int, str]) -> AnswerLostError:
        told = "; ".join(f"{self._urls[server]}: {reason}" for server, reason in sorted(reasons.items()))
        return AnswerLostError(
            f"no server goes on with the text, of which {len(text.token_ids)} tokens have come ({told})",
            text=text.text,
            token_ids=text.token_ids,
        )

    async def _ask(self, url: str, text: AskedText) -> AsyncGenerator[Piece, None]:
        """What one server writes at a text."""
        if self._session is None:
            raise RequestError("the client is not open; use it as `async with Client(url) as client:`")
        try:
            async with self._session.post(f"{url}/v1/completions", json=text.request()) as response:
                if response.status != 200:
                    raise await _refusal(url, response)
                async for line in response.content:
                    if line.strip() == b"data: [DONE]":
                        return
                    if line.startswith(b"data: ") and line.endswith(b"\n"):  # else it was cut off
                        yield text.take(json.loads(line.removeprefix(b"data: ")))
        except aiohttp.ClientConnectorCertificateError as cause:
            given = (
                "no API key was given to check it by" if self._api_key is None else "it does not hold the API key given"
            )
            raise OtherKeyError(
                f"{url} is not trusted: {given}; see flowspec key show --api, where it serves"
            ) from cause
        except aiohttp.ClientConnectorError as cause:
            raise NodeUnavailableError(
                f"nothing answers at {url} ({system_words(cause)}); start one with: flowspec serve"
            ) from cause
        except (aiohttp.ClientError, OSError) as cause:
            why = "the connection broke" if isinstance(cause, aiohttp.ClientPayloadError) else system_words(cause)
            raise LinkLostError(f"the server at {url} was lost ({why}); ask again when it is back") from cause
        raise LinkLostError(f"the server at {url} ended the answer early; ask again")


async def _next(pieces: AsyncGenerator[Piece, None], until: float | None) -> Piece | None:
    """The next piece, or None behind the last. Raises LinkLostError where it does not come in time."""
    try:
        async with asyncio.timeout_at(until):
            return await anext(pieces, None)
    except TimeoutError:
        raise LinkLostError("it answers, but wrote nothing in time") from None


async def _refusal(url: str, response: aiohttp.ClientResponse) -> FlowspecError:
    """The error that a response tells of."""
    waits = response.headers.get("Retry-After", "")
    try:
        return error_of(await response.json(), response.status, float(waits) if waits.isdecimal() else DEFAULT_RETRY_S)
    except (aiohttp.ContentTypeError, ValueError, LookupError, TypeError):
        message = f"{url} answers {response.status} {response.reason}; is it a flowspec serve?"
        return RequestError(message) if response.status < 500 else StageFailedError(message)
