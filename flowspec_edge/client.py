"""An async client for ``flowspec serve``. It speaks HTTP only and imports neither numpy nor ONNX Runtime.

::

    async with Client("http://127.0.0.1:8008") as client:
        answer = client.generate("def add(a, b):", max_new_tokens=64)
        async for piece in answer:
            print(piece.text, end="", flush=True)
        print(answer.statistics)
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import aiohttp

from flowspec_edge.config import GenerateOptions, Piece
from flowspec_edge.errors import LinkLostError, NodeUnavailableError, RequestError, StageFailedError

CONNECT_S = 5.0
"""A LAN answers within milliseconds, a busy board within a second."""
MAX_EVENT_BYTES = 2**20
"""The last event of an answer is about a kilobyte."""


class Answer:
    """One answer, whose pieces are iterated over once; its attributes grow with them.

    Attributes:
        text: the text that has come so far.
        token_ids: the tokens of that text.
        finish_reason: ``stop`` or ``length``, once it has ended.
        statistics: figures of the generation, once it has ended (README, "What the figures mean").
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
    """A connection to one ``flowspec serve``. Leaving the ``async with`` block cancels what still runs.

    A server beyond this machine wants its ``api_key`` (flowspec key show --api, where it serves). The server's
    certificate follows from that key, so with ``https://`` no other server is trusted and no file is needed.
    """

    def __init__(self, url: str = "http://127.0.0.1:8008", *, api_key: str | None = None) -> None:
        self._url = url.rstrip("/")
        self._api_key = api_key
        self._session: aiohttp.ClientSession | None = None
        self._answers: list[Answer] = []

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
        self._session = aiohttp.ClientSession(
            timeout=timeout,
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
        if self._api_key is None or not self._url.startswith("https://"):
            return True
        from flowspec_edge.net.auth import trust_key

        with ThreadPoolExecutor(1) as thread:
            return await asyncio.get_running_loop().run_in_executor(thread, trust_key, self._api_key)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._session is not None
        for answer in self._answers:
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
        seed: int = 0,
        stop: Sequence[str] = (),
        schedule: str = "flowspec",
    ) -> Answer:
        """Stream a continuation of ``prompt``; see :class:`GenerateOptions` for the options.

        The request leaves with the first piece asked for. Iterating raises:

        Raises:
            RequestError: an option is out of range, or the prompt does not fit.
            NodeUnavailableError: nothing answers at the client's URL.
            StageFailedError: the nodes could not go on, or there are none.
            LinkLostError: the server was lost while it answered.
        """
        options = GenerateOptions(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=tuple(stop),
            schedule=schedule,
        )
        answer = Answer(self._stream(prompt, options))
        self._answers.append(answer)
        return answer

    async def complete(self, prompt: str, **options: Any) -> Answer:
        """The whole answer at once; takes and raises what :meth:`generate` does."""
        answer = self.generate(prompt, **options)
        async for _ in answer:
            pass
        return answer

    async def _stream(self, prompt: str, options: GenerateOptions) -> AsyncGenerator[Piece, None]:
        if self._session is None:
            raise RequestError("the client is not open; use it as `async with Client(url) as client:`")
        body = {
            "prompt": prompt,
            "max_tokens": options.max_new_tokens,
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
            "seed": options.seed,
            "stop": list(options.stop),
            "schedule": options.schedule,
            "stream": True,
        }
        try:
            async with self._session.post(f"{self._url}/v1/completions", json=body) as response:
                if response.status != 200:
                    await self._raise_refusal(response)
                async for line in response.content:
                    if not line.startswith(b"data: "):
                        continue
                    if line.strip() == b"data: [DONE]":
                        return
                    yield _piece_from(json.loads(line.removeprefix(b"data: ")))
        except aiohttp.ClientConnectorCertificateError as cause:
            given = (
                "no API key was given to check it by" if self._api_key is None else "it does not hold the API key given"
            )
            raise NodeUnavailableError(
                f"{self._url} is not trusted: {given}; see flowspec key show --api, where it serves"
            ) from cause
        except aiohttp.ClientConnectorError as cause:
            number = cause.os_error.errno or 0  # asyncio's own text has its objects in it
            why = os.strerror(number) if number > 0 else cause.os_error.strerror
            raise NodeUnavailableError(
                f"nothing answers at {self._url} ({why}); start one with: flowspec serve"
            ) from cause
        except (aiohttp.ClientError, OSError) as cause:
            raise LinkLostError(f"the server at {self._url} was lost ({cause}); ask again when it is back") from cause
        raise LinkLostError(f"the server at {self._url} ended the answer early; ask again")

    async def _raise_refusal(self, response: aiohttp.ClientResponse) -> None:
        try:
            message = (await response.json())["error"]["message"]
        except (aiohttp.ContentTypeError, ValueError, LookupError, TypeError):
            message = f"{self._url} answers {response.status} {response.reason}; is it a flowspec serve?"
        raise RequestError(message) if response.status < 500 else StageFailedError(message)


def _piece_from(event: dict[str, Any]) -> Piece:
    if "error" in event:
        raise StageFailedError(event["error"]["message"])
    choice = event["choices"][0]
    return Piece(
        text=choice["text"],
        token_ids=choice.get("token_ids", []),
        finish_reason=choice["finish_reason"],
        statistics=event.get("flowspec"),
    )
