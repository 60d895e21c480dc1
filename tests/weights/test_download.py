"""Weights over real loopback sockets: exactly the bytes that are missing, whatever the sources do."""

import asyncio
import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from multidict import CIMultiDictProxy
from yarl import URL

from flowspec_edge.core.weights.fetching import Source, WantedFile
from flowspec_edge.errors import CacheError, FetchError
from flowspec_edge.weights import download as weights
from flowspec_edge.weights import server as weight_server
from flowspec_edge.weights.cache import WeightCache
from flowspec_edge.weights.download import fetch_files, fetch_manifest
from flowspec_edge.weights.server import READ_BYTES
from tests.narrowing import present
from tests.weights.peers import MakePeer, Peer

SIZE = 3 * 2**20 + 17


async def fetch(
    cache: WeightCache, wanted: Sequence[WantedFile], sources: Sequence[Peer], **options: Any
) -> weights.FetchReport:
    """Fetch into the cache; the report."""
    with contextlib.ExitStack() as held:
        parts = {file.sha256: present(cache.open_part(file.sha256)) for file in wanted}
        for part in parts.values():
            held.callback(part.close)
        wanted = [WantedFile(file.sha256, file.name, file.num_bytes, parts[file.sha256].num_bytes) for file in wanted]
        async with asyncio.timeout(20):
            return await fetch_files(wanted, [peer.source for peer in sources], parts, **options)


def make_files(num_files: int, size: int = SIZE) -> tuple[list[bytes], list[WantedFile]]:
    files = [os.urandom(size) for _ in range(num_files)]
    return files, [WantedFile(hashlib.sha256(data).hexdigest(), f"file-{i}", size) for i, data in enumerate(files)]


def assert_here(cache: WeightCache, files: Sequence[bytes], wanted: Sequence[WantedFile]) -> None:
    for data, file in zip(files, wanted, strict=True):
        assert present(cache.find(file.sha256)).read_bytes() == data
    assert not [file for file in cache.files() if file.sha256.endswith(".part")]


async def test_all_bytes_come_once_from_several_sources_at_once(peers: MakePeer, cache: WeightCache) -> None:
    files, wanted = make_files(6, size=READ_BYTES + 1)
    near, far = await peers("near", files), await peers("far", files)
    counted: list[int] = []
    report = await fetch(cache, wanted, [near, far], on_progress=counted.append)
    assert_here(cache, files, wanted)
    assert sum(counted) == sum(report.num_bytes.values()) == 6 * (READ_BYTES + 1)
    assert near.server.num_bytes_sent + far.server.num_bytes_sent == 6 * (READ_BYTES + 1)
    assert near.server.num_bytes_sent and far.server.num_bytes_sent
    assert report.accusations == []


async def test_a_bounded_rate_holds_for_all_sources_together(peers: MakePeer, cache: WeightCache) -> None:
    files, wanted = make_files(4, size=READ_BYTES + 1)
    sources = [await peers(name, files) for name in ("near", "far")]
    began = time.monotonic()
    await fetch(cache, wanted, sources, max_bytes_per_s=20 * READ_BYTES)
    assert time.monotonic() - began >= 4 / 20
    assert_here(cache, files, wanted)


async def test_each_file_comes_from_who_has_it_and_nothing_else_is_asked_for(
    peers: MakePeer, cache: WeightCache
) -> None:
    files, wanted = make_files(3, size=5000)
    near, far = await peers("near", files[:1]), await peers("far", files[1:])
    report = await fetch(cache, wanted[:2], [near, far])
    assert report.num_bytes == {near.source: 5000, far.source: 5000}
    assert_here(cache, files[:2], wanted[:2])
    assert cache.find(wanted[2].sha256) is None
    assert {name for name, _ in near.asked + far.asked} == {"have", wanted[0].sha256, wanted[1].sha256}


async def test_a_fetch_cut_in_the_middle_goes_on_where_it_was(peers: MakePeer, cache: WeightCache) -> None:
    (data,), wanted = make_files(1)
    whole = await peers("whole", [data])
    part = present(cache.open_part(wanted[0].sha256))
    part.write(data[: SIZE // 2])
    part.close()
    report = await fetch(cache, wanted, [whole])
    assert_here(cache, [data], wanted)
    assert whole.asked[-1] == (wanted[0].sha256, f"bytes={SIZE // 2}-")
    assert report.num_bytes == {whole.source: SIZE - SIZE // 2}


class Proxy:
    """Passes bytes on to a peer, and cuts the connection after so many of them."""

    def __init__(self, port: int, limits: Sequence[int]) -> None:
        self.port, self.limits, self.num_passed = port, list(limits), 0

    async def start(self) -> int:
        self.server = await asyncio.start_server(self.take, "127.0.0.1", 0)
        port: int = self.server.sockets[0].getsockname()[1]
        return port

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ahead, behind = await asyncio.open_connection("127.0.0.1", self.port)
        limit = self.limits.pop(0) if self.limits else None

        async def upwards() -> None:
            while data := await reader.read(65536):
                behind.write(data)

        up = asyncio.create_task(upwards())
        try:
            passed = 0
            while data := await ahead.read(65536):
                writer.write(data if limit is None else data[: limit - passed])
                passed += len(data)
                await writer.drain()
                if limit is not None and passed >= limit:
                    break
        except ConnectionError:
            pass
        finally:
            up.cancel()
            writer.close()
            behind.close()

    def close(self) -> None:
        self.server.close()


async def test_a_source_lost_in_the_middle_costs_less_than_one_block(peers: MakePeer, cache: WeightCache) -> None:
    """The cut comes at half of the file; what is asked for again is what never arrived, and what aiohttp still held."""
    (data,), wanted = make_files(1)
    peer = await peers("far", [data])
    proxy = Proxy(peer.served.port, [SIZE // 2])
    port = await proxy.start()
    peer.source = Source("far", "127.0.0.1", port)
    try:
        report = await fetch(cache, wanted, [peer])
    finally:
        proxy.close()
    assert_here(cache, [data], wanted)
    assert report.num_bytes[peer.source] == SIZE
    assert report.accusations == []
    resumed_at = int(present(peer.asked[-1][1]).removeprefix("bytes=").removesuffix("-"))
    assert SIZE // 2 - 2**20 < resumed_at <= SIZE // 2


def answering(**changes: Any) -> Middleware:
    """Change what a file is answered with: ``data``, or ``headers``, or ``status``."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path == "/weights/have":
            return await handler(request)
        data = changes.get("data", b"")
        headers = {"Content-Range": f"bytes 0-{len(data) - 1}/{len(data)}", **changes.get("headers", {})}
        return web.Response(body=data, status=changes.get("status", 206), headers=headers)

    return middleware


async def test_wrong_bytes_are_thrown_away_their_sender_is_named_and_another_asked(
    peers: MakePeer, cache: WeightCache, caplog: pytest.LogCaptureFixture
) -> None:
    files, wanted = make_files(1)
    liar = await peers("liar", files, answering(data=files[0][:-1] + b"?"))
    honest = await peers("honest", files)
    report = await fetch(cache, wanted, [liar, honest])
    assert_here(cache, files, wanted)
    (accusation,) = report.accusations
    assert accusation.startswith(f"liar at 127.0.0.1:{liar.served.port} sent file-0 with sha256")
    assert accusation in caplog.text
    assert "honest" not in caplog.text


async def test_where_only_a_liar_has_it_the_fetch_fails_and_nothing_is_kept(
    peers: MakePeer, cache: WeightCache
) -> None:
    files, wanted = make_files(1, size=1000)
    liar = await peers("liar", files, answering(data=bytes(1000)))
    with pytest.raises(FetchError, match=r"file-0 \(1000 bytes\) .* liar at .* sent file-0 with sha256"):
        await fetch(cache, wanted, [liar])
    assert cache.files() == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"data": bytes(7)}, "answered 206 bytes 0-6/7 where bytes 0-999/1000 of file-0 was expected"),
        ({"data": bytes(2000), "headers": {"Content-Range": "bytes 0-999/1000"}}, "offers 2000 bytes of file-0; 1000"),
        ({"data": bytes(1000), "status": 200}, "answered 200"),
        ({"status": 302, "headers": {"Location": "http://192.0.2.1/"}}, "answered 302"),
        ({"data": bytes(1000), "headers": {"Content-Encoding": "gzip"}}, "offers 1000 bytes"),
    ],
)
async def test_a_peer_that_lies_about_a_length_is_not_listened_to(
    peers: MakePeer, cache: WeightCache, changes: Mapping[str, bytes | dict[str, str] | int], text: str
) -> None:
    files, wanted = make_files(1, size=1000)
    liar, honest = await peers("liar", files, answering(**changes)), await peers("honest", files)
    report = await fetch(cache, wanted, [liar, honest])
    assert_here(cache, files, wanted)
    assert text in report.accusations[0]
    assert report.num_bytes == {honest.source: 1000}


async def test_a_peer_that_stands_still_is_left(
    peers: MakePeer, cache: WeightCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "STALL_S", 0.2)
    files, wanted = make_files(1, size=1000)

    released = asyncio.Event()

    @web.middleware
    async def stand_still(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path != "/weights/have":
            await released.wait()
        return await handler(request)

    slow, honest = await peers("slow", files, stand_still), await peers("honest", files)
    report = await fetch(cache, wanted, [slow, honest])
    released.set()
    assert report.num_bytes == {honest.source: 1000}


async def test_sources_that_cannot_serve_are_named_with_their_reasons(peers: MakePeer, cache: WeightCache) -> None:
    files, wanted = make_files(1, size=1000)
    gone = await peers("gone", files)
    await gone.close()
    odd = await peers("odd", files, answering(status=500))
    odd.server._find = lambda name: None
    with pytest.raises(FetchError, match=r"gone at .* cannot be reached .*; odd at .* does not have it"):
        await fetch(cache, wanted, [gone, odd])


async def test_too_many_transfers_are_refused_and_come_back(
    peers: MakePeer, cache: WeightCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, wanted = make_files(2, size=1000)
    busy = await peers("busy", files)
    monkeypatch.setattr(weight_server, "MAX_UPLOADS", 1)
    report = await fetch(cache, wanted, [busy])
    assert_here(cache, files, wanted)
    assert report.num_bytes == {busy.source: 2000}


async def test_a_cancelled_fetch_leaves_what_came_to_go_on_with(peers: MakePeer, cache: WeightCache) -> None:
    (data,), wanted = make_files(1)
    peer = await peers("far", [data])
    came = asyncio.Event()
    task = asyncio.create_task(fetch(cache, wanted, [peer], on_progress=lambda num_bytes: came.set()))
    await came.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (part,) = cache.files()
    assert 0 < part.num_bytes < SIZE and not part.is_in_use
    report = await fetch(cache, wanted, [peer])
    assert report.num_bytes == {peer.source: SIZE - part.num_bytes}
    assert_here(cache, [data], wanted)


async def test_a_full_disk_is_named_and_nothing_half_written_is_used(peers: MakePeer, tmp_path: Path) -> None:
    if shutil.which("mount") is None:
        pytest.skip("a small disk to fill needs mount")
    mount = tmp_path / "small"
    mount.mkdir()
    command = ("mount", "-t", "tmpfs", "-o", "size=1m", "none", str(mount))
    mounting = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
    if await mounting.wait():
        pytest.skip("a small disk to fill needs root, to mount a tmpfs")
    try:
        (data,), wanted = make_files(1)
        cache = WeightCache(mount)
        with pytest.raises(CacheError, match=r"the disk is full \(.*\(flowspec cache prune\)"):
            await fetch(cache, wanted, [await peers("far", [data])])
        assert cache.find(wanted[0].sha256) is None
    finally:
        await (await asyncio.create_subprocess_exec("umount", str(mount))).wait()


async def answer_of(peer: Peer, method: str, path: str, **options: Any) -> tuple[int, bytes, CIMultiDictProxy[str]]:
    async with aiohttp.ClientSession() as session, asyncio.timeout(5):
        url = URL(f"http://127.0.0.1:{peer.served.port}{path}", encoded=True)
        async with session.request(method, url, **options) as response:
            return response.status, await response.read(), response.headers


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "..%2f..%2fetc%2fpasswd",
        "%2fetc%2fpasswd",
        "manifest.json",
        "A" * 64,
        "a" * 63,
        "a" * 64 + "%00",
    ],
)
async def test_names_lead_nowhere_but_to_files_by_their_sums(peers: MakePeer, name: str) -> None:
    peer = await peers("far", [b"x"])
    peer.server._find = lambda name: pytest.fail(f"looked for {name}")
    status, body, _ = await answer_of(peer, "GET", f"/weights/{name}")
    assert status in (400, 404)
    assert b"root:" not in body


async def test_ranges(peers: MakePeer) -> None:
    data = bytes(range(100))
    peer, name = await peers("far", [data]), hashlib.sha256(data).hexdigest()
    status, body, headers = await answer_of(peer, "GET", f"/weights/{name}", headers={"Range": "bytes=90-"})
    assert (status, body, headers["Content-Range"]) == (206, data[90:], "bytes 90-99/100")
    status, body, _ = await answer_of(peer, "GET", f"/weights/{name}", headers={"Range": "bytes=10-19"})
    assert (status, body) == (206, data[10:20])
    assert (await answer_of(peer, "GET", f"/weights/{name}"))[:2] == (200, data)
    for text in ("bytes=100-", "bytes=x", "bytes=9-3"):
        status, _, headers = await answer_of(peer, "GET", f"/weights/{name}", headers={"Range": text})
        assert (status, headers["Content-Range"]) == (416, "bytes */100")
    assert (await answer_of(peer, "GET", f"/weights/{'0' * 64}"))[0] == 404


@pytest.mark.parametrize(
    "body", [b"", b"{", b"{}", b'["../x"]', b"[1]", b"\xff", b'["' + b'", "'.join([b"a" * 64] * 5000) + b'"]']
)
async def test_a_question_that_is_no_list_of_sums_is_refused(peers: MakePeer, body: bytes) -> None:
    peer = await peers("far", [b"x"])
    status, answer, _ = await answer_of(peer, "POST", "/weights/have", data=body)
    assert status == 400
    assert b"sha256" in answer


async def test_a_manifest_comes_from_the_first_that_has_the_right_one(peers: MakePeer) -> None:
    text = "{}" * 100
    digest = hashlib.sha256(text.encode()).hexdigest()
    liar = await peers("liar", [text.encode()], answering(data=b"{}", status=200))
    empty, honest = await peers("empty", []), await peers("honest", [text.encode()])
    sources = [liar.source, empty.source, honest.source]
    assert await fetch_manifest(digest, sources) == text
    with pytest.raises(FetchError, match=r"liar at .* something else under that name; empty at .* answered 404"):
        await fetch_manifest(digest, sources[:2])
    with pytest.raises(FetchError, match="no node has it"):
        await fetch_manifest(digest, [])


async def test_a_manifest_without_end_is_not_read(peers: MakePeer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MAX_MANIFEST_BYTES", 1000)
    peer = await peers("far", [bytes(2000)])
    with pytest.raises(FetchError, match="more than 1000 bytes"):
        await fetch_manifest(next(iter(peer.files)), [peer.source])
