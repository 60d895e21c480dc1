"""The page and the stream that moves it, over real sockets, in front of a ring that a test makes up."""

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from flowspec_edge.core.speculation.draft_table import LikelyDrafts
from flowspec_edge.core.speculation.lanes import Job, Span, Trip
from flowspec_edge.core.speculation.pictures import KnownRow, RingPicture, TextPicture, Way
from flowspec_edge.core.speculation.statistics import GenerationStatistics
from flowspec_edge.net.api_keys import ApiKeyBook, add_api_key
from flowspec_edge.net.server import serve_app
from flowspec_edge.origin.view import MAX_TOKEN_CHARACTERS, ServiceView, WorkView
from flowspec_edge.web import start_page, viewing
from flowspec_edge.web.app import build_app
from flowspec_edge.web.guard import Guard
from flowspec_edge.web.viewing import LABEL, Advise, Viewed
from tests.web.served import CARD
from tests.web.templates import template_of
from tests.web.test_completions import PIECES, ScriptedGenerator

VIEW = ServiceView(
    model="demo", drafts="none", origin="pi", is_ready=True, reason="", ring=None, boards=[], lost=[], fetches=[]
)
DRAFTS = LikelyDrafts([9, 10], [8, 9], [70, 71], [4, 5], [True, False], [0.5, 0.25])
BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


def text_of(session: int, label: str) -> TextPicture:
    return TextPicture(
        session=session,
        label=label,
        num_prompt=3,
        num_read=3,
        position=3,
        text=[KnownRow(8, 65)],
        num_drafts=2,
        drafts=DRAFTS,
        ways=[Way([9], 1.0, [1.5], [2.0])],
        counts=GenerationStatistics(num_tokens=session),
    )


class MadeUp:
    """What is viewed: ``texts``, at a time that counts the looks. A look may be waited for."""

    def __init__(self, *texts: TextPicture) -> None:
        self.texts = texts
        self.num_looks = self.num_views = 0
        self.looked = asyncio.Event()

    def view(self) -> ServiceView:
        self.num_views += 1
        return VIEW

    def look(self, label: str, since: float) -> WorkView | None:
        self.num_looks += 1
        self.looked.set()
        now = float(self.num_looks)
        trips = [Trip(1, (9,), Span(end - 0.5, end), (Span(end - 0.4, end - 0.2),), (1,)) for end in (now - 1.5, now)]
        job = Job(1, "head", Span(now - 1.9, now - 1.5))
        picture = RingPicture(now=now, texts=self.texts, trips=trips, jobs=[job])
        return WorkView.of(picture, lambda token: chr(token) * (100 if token == 71 else 1), label, since)


@contextlib.asynccontextmanager
async def serving(
    watched: MadeUp, guard: Guard | None = None, advise: Advise = dict, **options: Any
) -> AsyncIterator[aiohttp.ClientSession]:
    generator = ScriptedGenerator(PIECES)
    app = build_app(generator, guard, chat=template_of("Qwen 3"), card=CARD, viewed=Viewed(watched, advise))
    served = await serve_app(app, cancels_on_disconnect=True)
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{served.port}") as session, asyncio.timeout(30):
            yield session
    finally:
        await served.close()


async def events(response: aiohttp.ClientResponse, kind: str) -> AsyncIterator[dict[str, Any]]:
    """The events of that kind."""
    named = ""
    async for line in response.content:
        if line.startswith(b"event: "):
            named = line.decode().split()[1]
        elif line.startswith(b"data: ") and named == kind:
            yield json.loads(line.removeprefix(b"data: "))


async def first(session: aiohttp.ClientSession, kind: str, label: str = "") -> dict[str, Any]:
    async with session.get("/events", headers={LABEL: label}) as response:
        assert response.status == 200 and response.content_type == "text/event-stream"
        return await anext(events(response, kind))


async def test_a_viewer_is_told_of_all_and_reads_the_words_of_its_own_texts_alone() -> None:
    async with serving(MadeUp(text_of(1, "theirs"), text_of(2, "mine"), text_of(3, ""))) as session:
        told = await first(session, "work", "mine")
        assert [(text["session"], text["is_own"]) for text in told["texts"]] == [(2, True), (1, False), (3, False)]
        own, other = told["texts"][:2]
        assert own["text"] == [[8, "A"]] and own["drafts"]["words"] == ["F", "G" * MAX_TOKEN_CHARACTERS]
        assert other["text"] == [[8, ""]] and other["drafts"]["words"] == ["", ""]
        assert other["drafts"] | {"tokens": DRAFTS.tokens} == DRAFTS._asdict() | {"words": ["", ""]}
        assert own["ways"] == [[[9], 1.0, [1.5], [2.0]]] and own["counts"]["num_tokens"] == 2
        for label in ("", "no label", "x" * 65):
            assert not any(text["is_own"] for text in (await first(session, "work", label))["texts"])


async def test_what_has_ended_is_told_once() -> None:
    async with serving(MadeUp(text_of(1, ""))) as session, session.get("/events") as response:
        work = events(response, "work")
        before = await anext(work)
        assert len(before["jobs"]) == 1, "the first look tells what was noted for others"
        after = await anext(work)
        assert after["now"] == before["now"] + 1
        assert [trip[2] for trip in after["trips"]] == [[before["now"] + 0.5, before["now"] + 1]]
        assert after["jobs"] == [], "it had ended before the last look"


async def test_the_service_and_advice_are_told_at_once() -> None:
    advised = []

    def advise() -> dict[str, Any]:
        advised.append(1)
        return {"join": {"text": "a", "command": "b"}}

    async with serving(MadeUp(), advise=advise) as session:
        told = await first(session, "service")
        assert told["service"] == dataclasses.asdict(VIEW)
        assert told["texts"] == {"running": 0, "waiting": 0, "most": 16}
        assert told["advice"]["join"]["command"] == "b"
        await first(session, "service")
        assert len(advised) == 1, "advice is kept for a while"


async def test_nothing_is_computed_while_nobody_looks() -> None:
    watched = MadeUp(text_of(1, ""))
    async with serving(watched) as session:
        async with session.get("/", headers=BROWSER) as response:
            assert response.status == 200
        assert (watched.num_looks, watched.num_views) == (0, 0)
        await first(session, "work")
        looks = watched.num_looks
        watched.looked.clear()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                while True:  # the look that was under way may end
                    await watched.looked.wait()
                    watched.looked.clear()
        assert watched.num_looks <= looks + 1


async def test_a_viewer_that_reads_nothing_gets_what_is_then_once_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its socket takes so much. Beyond that nothing is made for it, or the loop below would not end."""
    monkeypatch.setattr(viewing, "WORK_S", 0.01)
    ones = [1] * 20_000
    drafts = LikelyDrafts(ones, ones, ones, ones, [True] * len(ones), [0.5] * len(ones))
    watched = MadeUp(dataclasses.replace(text_of(1, ""), drafts=drafts))
    async with serving(watched) as session, session.get("/events") as response:
        work = events(response, "work")
        await anext(work)
        looks = -1
        while looks != watched.num_looks:
            looks = watched.num_looks
            await asyncio.sleep(0.2)
        watched.texts = (text_of(7, ""),)
        async for told in work:
            if told["texts"][0]["session"] == 7:
                break
        assert told["now"] <= looks + 2, "nothing is told late"


async def test_more_viewers_than_a_ring_bears_are_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewing, "MAX_VIEWERS", 1)
    async with serving(MadeUp()) as session:
        async with session.get("/events") as response:
            await anext(events(response, "service"))
            async with session.get("/events") as refused:
                assert refused.status == 429 and "close one" in (await refused.json())["error"]["message"]
        while True:  # the server hears that the first one has left
            async with session.get("/events") as response:
                if response.status == 200:
                    break


async def test_a_server_that_ends_ends_its_streams() -> None:
    served = await serve_app(build_app(ScriptedGenerator(PIECES), viewed=Viewed(MadeUp())))
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{served.port}/events") as response:
        told = events(response, "service")
        await anext(told)
        closing = asyncio.create_task(served.close())
        async with asyncio.timeout(30):
            assert await anext(told, None) is None
            assert response.content.at_eof(), "in order, and not cut off"
            await closing


async def test_a_text_is_labelled_as_its_request_is() -> None:
    generator = ScriptedGenerator(PIECES)
    served = await serve_app(build_app(generator))
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{served.port}") as session:
            for label in ("mine-1", "", "<b>"):
                async with session.post("/v1/completions", json={"prompt": "x"}, headers={LABEL: label}) as response:
                    assert response.status == 200
    finally:
        await served.close()
    assert [options.label for _, options in generator.asked] == ["mine-1", "", ""]


# ---------------------------------------------------------------------- the page's files


async def test_browsers_get_the_page_and_programs_a_greeting() -> None:
    async with serving(MadeUp()) as session:
        async with session.get("/", headers=BROWSER) as response:
            assert response.content_type == "text/html" and "<title>flowspec</title>" in await response.text()
        async with session.get("/") as response:
            assert await response.text() == "Ollama is running"


async def test_every_file_that_the_page_names_is_there_and_comes_from_here_alone() -> None:
    named = {path.name: path.read_text() for path in start_page.FOLDER.iterdir()}
    async with serving(MadeUp()) as session:
        for name, source in named.items():
            if name != start_page.START:
                async with session.get(f"/page/{name}") as response:
                    assert response.status == 200 and await response.text() == source
            for found in (part.split('"')[0] for part in source.split('"/page/')[1:]):
                assert found in named, f"{name} names {found}"
            urls = {part.split('"')[0].split("<")[0] for part in source.split("https://")[1:]}
            assert not urls, f"{name} names {urls}"
        async with session.get("/page/../app.py") as response:
            assert response.status == 404


async def test_the_page_is_served_under_a_strict_policy_and_sent_again_only_where_it_changed() -> None:
    async with serving(MadeUp()) as session, session.get("/", headers=BROWSER) as response:
        policy = response.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "require-trusted-types-for" in policy
        tag = response.headers["ETag"]
        async with session.get("/", headers={**BROWSER, "If-None-Match": tag}) as again:
            assert (again.status, await again.read()) == (304, b"")
        async with session.get("/", headers={**BROWSER, "If-None-Match": '"other"'}) as again:
            assert again.status == 200


async def test_the_page_needs_no_key_and_all_that_it_shows_does() -> None:
    watched = MadeUp(text_of(1, ""))
    async with serving(watched, Guard(keys=ApiKeyBook())) as session:
        key = add_api_key("phone")
        for path in ("/", "/page/main.js"):
            async with session.get(path, headers=BROWSER) as response:
                assert response.status == 200
        for path in ("/events", "/page", "/pages/x"):
            async with session.get(path) as response:
                assert response.status == 401, path
        assert watched.num_looks == 0
        async with session.get("/events", headers={"Authorization": f"Bearer {key}"}) as response:
            assert response.status == 200


@pytest.mark.parametrize("path", ["/", "/page/main.js", "/events"])
async def test_a_page_that_led_its_own_name_here_gets_nothing(path: str) -> None:
    async with serving(MadeUp()) as session:
        async with session.get(path, headers={**BROWSER, "Host": "evil.example"}) as response:
            assert response.status == 403
        async with session.get(path, headers={**BROWSER, "Origin": "http://evil.example"}) as response:
            assert response.status == 403
