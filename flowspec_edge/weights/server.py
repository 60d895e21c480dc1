"""Weight files over HTTP: what a node hands out to others.

``POST /weights/have`` takes a JSON list of sha256 and answers with those that are here. ``GET /weights/SHA256`` gives
one file, whole or from a byte on (Range, RFC 9110, 14.1.2). Files have no other names on the network, so no name can
lead anywhere else on the disk.
"""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import msgspec
from aiohttp import web

from flowspec_edge.weights.cache import is_sha256

READ_BYTES = 262144
"""One read of a file being sent, one write of a file being fetched: over TLS 284-428 MB/s, checking included (x86, 2
cores); aiohttp's FileResponse came to 100-158 MB/s."""
STALL_S = 15.0
"""How long a transfer may stand still. A card that writes back its cache takes a few seconds."""
MAX_UPLOADS = 32
"""Files that are sent at once; a node that asks for another one then is told to come back later."""
UPLOAD_THREADS = 2
MAX_QUESTIONS = 4096
"""Files per question: twelve times the layers of the deepest known model, in three precisions."""

Find = Callable[[str], Path | bytes | None]
"""Finds a file by its sha256: where it lies, or its bytes; None where it is not here."""

_log = logging.getLogger(__name__)


class WeightServer:
    """Sends the files that ``find`` finds to everyone who reaches the application that it is part of."""

    def __init__(self, find: Find) -> None:
        self.num_bytes_sent = 0
        self._find = find
        self._num_uploads = 0
        self._executor = ThreadPoolExecutor(UPLOAD_THREADS, thread_name_prefix="weights")

    def build_app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/weights/have", self._tell)
        app.router.add_get("/weights/{sha256}", self._send)
        return app

    def close(self) -> None:
        """End the threads. Call it when the application is closed; a thread then reads READ_BYTES more at most."""
        self._executor.shutdown(cancel_futures=True)

    async def _tell(self, request: web.Request) -> web.Response:
        try:
            asked = msgspec.json.decode(await request.read(), type=list[str])
        except (ValueError, msgspec.DecodeError):
            asked = [""]
        if len(asked) > MAX_QUESTIONS or not all(map(is_sha256, asked)):
            raise web.HTTPBadRequest(text=f"expected a JSON list of at most {MAX_QUESTIONS} sha256 in hex")
        loop = asyncio.get_running_loop()
        return web.json_response(await loop.run_in_executor(self._executor, self._held, asked))

    def _held(self, names: list[str]) -> list[str]:
        """Those that are here. That asks the disk for each."""
        return [name for name in names if self._find(name) is not None]

    async def _send(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["sha256"]
        if not is_sha256(name):
            raise web.HTTPBadRequest(text=f"{name!r:.80} is not a sha256 in hex")
        if self._num_uploads >= MAX_UPLOADS:
            raise web.HTTPServiceUnavailable(text=f"{MAX_UPLOADS} files are being sent (MAX_UPLOADS); come back later")
        self._num_uploads += 1
        try:
            with self._open(name) as file:
                return await self._stream(request, file)
        finally:
            self._num_uploads -= 1

    def _open(self, name: str) -> BinaryIO:
        found = self._find(name)
        try:
            if found is not None:
                return io.BytesIO(found) if isinstance(found, bytes) else found.open("rb")
        except FileNotFoundError:  # it was evicted meanwhile
            pass
        except OSError as cause:
            _log.warning("%s cannot be sent (%s)", found, cause.strerror or cause)
        raise web.HTTPNotFound(text=f"no file {name[:12]} here")

    async def _stream(self, request: web.Request, file: BinaryIO) -> web.StreamResponse:
        num_bytes = file.seek(0, io.SEEK_END)
        try:
            start, stop, _ = request.http_range.indices(num_bytes)
        except ValueError:
            start, stop = num_bytes, num_bytes
        if start >= stop:
            raise web.HTTPRequestRangeNotSatisfiable(headers={"Content-Range": f"bytes */{num_bytes}"})
        response = web.StreamResponse(status=206 if "Range" in request.headers else 200)
        response.content_length = stop - start
        response.content_type = "application/octet-stream"
        if response.status == 206:
            response.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{num_bytes}"
        await response.prepare(request)
        file.seek(start)
        try:
            await self._copy(file, response, stop - start)
        except (EOFError, OSError) as cause:  # TimeoutError and ConnectionError are of the latter, and a broken disk
            _log.info("peer at %s: a file of weights was not sent to its end (%s)", request.remote, cause)
            if (
                request.transport is not None
            ):  # the client would take the next answer on this connection for the rest of the file
                request.transport.abort()
        return response

    async def _copy(self, file: BinaryIO, response: web.StreamResponse, num_bytes: int) -> None:
        loop = asyncio.get_running_loop()
        while num_bytes:
            data = await loop.run_in_executor(self._executor, file.read, min(READ_BYTES, num_bytes))
            if not data:
                raise EOFError("the file has become shorter")
            async with asyncio.timeout(STALL_S):
                await response.write(data)
            num_bytes -= len(data)
            self.num_bytes_sent += len(data)
