"""A client for the HTTP API of a ``flowspec serve``.

It needs neither numpy nor ONNX Runtime.

::

    async with Client("pi-kitchen", api_key="fsa1-...") as client:
        answer = client.generate("def add(a, b):", max_new_tokens=64)
        async for piece in answer:
            print(piece.text, end="", flush=True)
        print(answer.usage, answer.trips)

``async with await Client.discover() as client:`` looks for a server on this machine and on the network.

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
import math
import random
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from flowspec_edge.config import GenerateOptions, Grammar, Piece
from flowspec_edge.core.answer_parts import TextLogprob, ToolCall
from flowspec_edge.core.asked_chat import AskedChat
from flowspec_edge.core.asked_text import AskedText
from flowspec_edge.core.cluster import reconnection as rc
from flowspec_edge.core.cluster.api_url import API_PORT, read_api_url
from flowspec_edge.errors import (
    AnswerLostError,
    AnswerTimeoutError,
    FlowspecError,
    LinkLostError,
    NodeUnavailableError,
    OtherKeyError,
    RequestError,
    ServerBusyError,
)
from flowspec_edge.net.api_session import ApiSession

SILENCE_S = 10.0
"""After how long a server that says nothing counts as lost, where a text is to survive it. It says something every two
seconds."""
RESUME_S = 120.0
"""How long a text may stand still: a Raspberry Pi that lost its power serves again after less than a minute."""
RETRIES, RETRY_FIRST_S = 2, 0.25
"""How often a server is asked again that did not begin to answer, and after how long; each time after twice as long."""


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens of a prompt and of what was written. ``cached_tokens`` of the prompt were known from before."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Health:
    """Whether a server can write texts now, and why not. ``details`` is all that it told."""

    is_ready: bool
    reason: str
    details: Mapping[str, Any]


class Answer:
    """One answer, whose pieces are iterated over once; its attributes grow with them.

    Attributes:
        text: the text that has come so far.
        reasoning: what the model thought before it, where that comes apart.
        token_ids: the tokens of both.
        tool_calls: calls of tools, in the order in which they were written.
        logprobs: of each token, where they were asked for.
        finish_reason: ``stop``, ``length`` or ``tool_calls``, once it has ended.
        statistics: figures of the generation, once it has ended (docs/clients.md, "What the figures mean"). Where it
            was resumed, ``completion_tokens`` counts all tokens, the last server was given the first
            ``resumed_tokens`` of them, and the other figures are of what it wrote itself.
    """

    def __init__(
        self, pieces: AsyncGenerator[Piece, None], asked: AskedText | AskedChat, timeout: float | None
    ) -> None:
        self._pieces = pieces
        self._timeout, self._deadline = timeout, math.inf
        self.text = self.reasoning = ""
        self.token_ids: list[int] = []
        self.tool_calls: Sequence[ToolCall] = asked.tool_calls
        self.logprobs: Sequence[TextLogprob] = asked.logprobs
        self.finish_reason: str | None = None
        self.statistics: dict[str, Any] | None = None

    @property
    def usage(self) -> Usage | None:
        """How many tokens it took, once it has ended."""
        if (found := self.statistics) is None:
            return None
        return Usage(found["prompt_tokens"], found["completion_tokens"], found.get("cached_tokens", 0))

    @property
    def trips(self) -> int | None:
        """How many chunks came back around the ring for it, once it has ended."""
        return None if self.statistics is None else self.statistics.get("trips")

    @property
    def message(self) -> dict[str, Any]:
        """The message that it is, as a dialogue goes on with it. Results of calls come behind it, each in a message of
        the role ``tool``, with the ``tool_call_id``.
        """
        calls = {"tool_calls": [call.told() for call in self.tool_calls]} if self.tool_calls else {}
        return {"role": "assistant", "content": self.text, **calls}

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        if self._timeout is not None and self._deadline == math.inf:
            self._deadline = asyncio.get_running_loop().time() + self._timeout
        try:
            async with asyncio.timeout_at(self._deadline if self._timeout is not None else None):
                piece = await anext(self._pieces)
        except TimeoutError as cause:
            raise AnswerTimeoutError(
                f"the answer did not end within {self._timeout:g} s (timeout); {len(self.token_ids)} tokens came"
            ) from cause
        self.text += piece.text
        self.reasoning += piece.reasoning
        self.token_ids += piece.token_ids
        self.finish_reason = piece.finish_reason or self.finish_reason
        self.statistics = piece.statistics or self.statistics
        return piece

    async def aclose(self) -> None:
        """Cancel the generation; the nodes stop working on it."""
        await self._pieces.aclose()


class Client:
    """A client of one ``flowspec serve``, or of several. Leaving the ``async with`` block cancels what still runs.

    ``urls`` may be names or addresses alone: then the scheme is https where there is a key, and the port 8008.

    A server beyond this machine wants an ``api_key`` (flowspec key api add NAME, where it serves). It proves that it
    knows the key before the key is sent, so no file is needed to trust its certificate. Over plain HTTP a key leaves
    this machine with ``allows_plain_http`` alone. Several servers need one and the same key.

    An answer may take ``timeout`` seconds in all. A server that does not begin to answer, or is busy, is asked again
    ``retries`` times.

    With ``resume`` a text does not end with its server. Where the connection breaks, the server is silent for 10 s, or
    says that it cannot go on or is about to end, the next of ``urls`` is asked to go on, and the first one again after
    the last. It gets the tokens of prompt and text, and the seed, and goes on with the token that would have come next;
    not a character comes twice or is left out. Only a server of the same bundle does; where it computes on boards of
    another kind, it goes on as these round. A text may stand still for ``resume_within_s``.

    Raises:
        RequestError: a URL is none.
        PlainHttpError: the key would leave this machine unencrypted.
    """

    def __init__(
        self,
        *urls: str,
        api_key: str | None = None,
        resume: bool = False,
        resume_within_s: float = RESUME_S,
        timeout: float | None = None,
        retries: int = RETRIES,
        allows_plain_http: bool = False,
    ) -> None:
        self._api_key = (api_key or "").strip() or None
        self._urls = [
            read_api_url(url, has_key=self._api_key is not None, allows_plain_http=allows_plain_http)
            for url in urls or (f"http://127.0.0.1:{API_PORT}",)
        ]
        if len(self._urls) > 1 and not resume:
            raise RequestError(f"{len(urls)} servers are given, and only with resume=True the next one is ever asked")
        self._resume_within_s = resume_within_s if resume else None
        self._timeout, self._retries = timeout, retries
        self._server = 0  # in _urls: the one to ask first, for it wrote the latest piece
        self._session: ApiSession | None = None
        self._answers: weakref.WeakSet[Answer] = weakref.WeakSet()

    @classmethod
    async def discover(
        cls, *, api_key: str | None = None, model: str | None = None, within_s: float = 5.0, **options: Any
    ) -> Self:
        """A client of a server that answers on this machine's port 8008, or else of one that is heard on the network.

        ``model`` is the name of the one wanted; ``options`` are those of :class:`Client`.

        Raises:
            NodeUnavailableError: none is found in that time.
        """
        from flowspec_edge.net.api_discovery import find_api

        url, needs_key = await find_api(model=model, has_key=api_key is not None, within_s=within_s)
        return cls(url, api_key=api_key if needs_key else None, **options)

    @property
    def url(self) -> str:
        """Of the server that is asked first."""
        return self._urls[self._server]

    async def __aenter__(self) -> Self:
        self._session = ApiSession(self._api_key, None if self._resume_within_s is None else SILENCE_S)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for answer in list(self._answers):
            await answer.aclose()
        await self._opened().close()

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
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        min_tokens: int = 0,
        num_logprobs: int | None = None,
        schedule: str = "flowspec",
        grammar: Grammar | None = None,
        timeout: float | None = None,
    ) -> Answer:
        """Stream a continuation of ``prompt``; see :class:`GenerateOptions` for the options. Without a ``seed`` the
        server draws one, which the statistics tell. The request leaves with the first piece asked for.

        Raises:
            RequestError: an option is out of range, or the prompt does not fit; this and all below while iterating.
            ApiKeyError: the server wants another API key.
            NodeUnavailableError: nothing answers at the client's URL.
            ServerBusyError: the server has as many texts to write as it takes.
            StageFailedError: the nodes could not go on, or there are none.
            LinkLostError: the server was lost while it answered.
            AnswerTimeoutError: the answer took longer than ``timeout``.
            AnswerLostError: with ``resume``, instead of all but the first two: no server went on in time.
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
            stop_token_ids=tuple(stop_token_ids),
            ignore_eos=ignore_eos,
            min_tokens=min_tokens,
            num_logprobs=num_logprobs,
            schedule=schedule,
            grammar=grammar,
        )
        within_s = self._resume_within_s
        text = AskedText(prompt, options, seed, is_resumable=within_s is not None)
        pieces = self._ask_again(text) if within_s is None else self._ask_until_it_ends(text, within_s)
        return self._answer(pieces, text, timeout)

    async def complete(self, prompt: str, **options: Any) -> Answer:
        """The whole answer at once; takes and raises what :meth:`generate` does."""
        return await _whole(self.generate(prompt, **options))

    def chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        timeout: float | None = None,
        **fields: Any,
    ) -> Answer:
        """Stream the next message of a dialogue. ``messages`` are as OpenAI's API has them, each with ``role`` and
        ``content``, or the text of one user. What is left out is as the server has it; ``fields`` are any others of its
        ``POST /v1/chat/completions``.

        ``tools`` are functions that the model may call, in OpenAI's form, and ``tool_choice`` says whether it has to.
        Its calls are in the answer's ``tool_calls``; its ``message`` and their results go on with the dialogue.

        The message does not survive its server; otherwise it raises what :meth:`generate` does.
        """
        asked = AskedChat(
            [{"role": "user", "content": messages}] if isinstance(messages, str) else messages,
            {
                "max_tokens": max_new_tokens,
                "temperature": temperature,
                "top_k": top_k,
                "top_p": top_p,
                "seed": seed,
                "stop": list(stop) or None,
                "tools": None if tools is None else list(tools),
                "tool_choice": tool_choice,
                **fields,
            },
        )
        return self._answer(self._ask_again(asked), asked, timeout)

    async def reply(self, messages: str | Sequence[Mapping[str, Any]], **options: Any) -> Answer:
        """The whole message at once; takes and raises what :meth:`chat` does."""
        return await _whole(self.chat(messages, **options))

    async def models(self) -> list[str]:
        """The names of the models that the server has. Raises what :meth:`generate` does."""
        _, told = await self._opened().get(self.url, "/v1/models", self._timeout)
        return [str(model["id"]) for model in told["data"]]

    async def health(self) -> Health:
        """Whether the server can write texts now. Raises what :meth:`generate` does."""
        status, told = await self._opened().get(self.url, "/health", self._timeout, may_be_unready=True)
        return Health(status == 200, str(told.get("reason", "")), told)

    def _answer(
        self, pieces: AsyncGenerator[Piece, None], asked: AskedText | AskedChat, timeout: float | None
    ) -> Answer:
        answer = Answer(pieces, asked, self._timeout if timeout is None else timeout)
        self._answers.add(answer)
        return answer

    async def _ask_again(self, asked: AskedText | AskedChat) -> AsyncGenerator[Piece, None]:
        """What the server writes; it is asked again where it does not begin."""
        for retry in range(self._retries + 1):
            try:
                async with contextlib.aclosing(self._ask(self._urls[0], asked)) as pieces:
                    async for piece in pieces:
                        yield piece
                return
            except (NodeUnavailableError, LinkLostError, ServerBusyError) as cause:
                if retry == self._retries or asked.has_begun or isinstance(cause, OtherKeyError):
                    raise
                wait_s = cause.retry_after_s if isinstance(cause, ServerBusyError) else RETRY_FIRST_S * 2**retry
            await asyncio.sleep(wait_s)

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
                (action,) = decisions.handle(_loss(cause, is_refusal), clock())
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

    async def _ask(self, url: str, asked: AskedText | AskedChat) -> AsyncGenerator[Piece, None]:
        """What one server writes at a text."""
        async with self._opened().post(url, asked.path, asked.request()) as response:
            async for line in response.content:
                if line.strip() == b"data: [DONE]":
                    return
                if line.startswith(b"data: ") and line.endswith(b"\n"):  # else it was cut off
                    yield asked.take(json.loads(line.removeprefix(b"data: ")))
        raise LinkLostError(f"the server at {url} ended the answer early; ask again")

    def _opened(self) -> ApiSession:
        if self._session is None:
            raise RequestError("the client is not open; use it as `async with Client(url) as client:`")
        return self._session


async def _whole(answer: Answer) -> Answer:
    async for _ in answer:
        pass
    return answer


class _NothingCameError(FlowspecError):
    """The server wrote nothing before the time for it was over."""


def _loss(cause: FlowspecError, is_refusal: bool) -> rc.ReconnectionEvent:
    if isinstance(cause, _NothingCameError):
        return rc.NothingCame()
    if is_refusal:
        return rc.ServerRefused(str(cause))
    return rc.ServerLost(str(cause), cause.retry_after_s if isinstance(cause, ServerBusyError) else 0.0)


async def _next(pieces: AsyncGenerator[Piece, None], until: float | None) -> Piece | None:
    """The next piece, or None behind the last. Raises _NothingCameError where it does not come in time."""
    try:
        async with asyncio.timeout_at(until):
            return await anext(pieces, None)
    except TimeoutError:
        raise _NothingCameError("the server wrote nothing in time") from None
