"""The page in a browser, in front of a real ring: it loads, answers, moves, and is there for everybody."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytest_asyncio

from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.net.api_keys import ApiKeyBook, add_api_key
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.net.server import serve_app
from flowspec_edge.node.node import Node
from flowspec_edge.origin.service import GenerationService
from flowspec_edge.web.app import build_app
from flowspec_edge.web.chat_template import ChatTemplate
from flowspec_edge.web.guard import Guard
from flowspec_edge.web.viewing import Viewed
from tests.ring.conftest import found_of, nodes_of
from tests.web.browser import CHROMIUM, NoBrowserError, Page, browsing

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here: apt-get install chromium"),
]
AXE = Path(__file__).parent / "axe.min.js.gz"
"""axe-core 4.14.1 as npm has it (MPL 2.0, https://github.com/dequelabs/axe-core): it finds what shuts people out."""
ADVICE = {
    "findings": [
        {
            "node": "<b>shed</b>",
            "address": "192.168.1.9:7361",
            "reason": "firewall",
            "detail": "it drops what comes",
            "remedy": "sudo ufw allow 7361/tcp",
        }
    ],
    "mdns_error": None,
    "join": {"text": "Run this.", "command": "flowspec key show", "code": ["101", "010"]},
}
DESKTOP: dict[str, Any] = {"width": 1280, "height": 900}
PHONE: dict[str, Any] = {"width": 390, "height": 844, "is_phone": True}
LOOKS = [(DESKTOP, False, "chat"), (DESKTOP, True, "chat"), (PHONE, False, "chat"), (PHONE, True, "ring")]
SAY = """((text, most) => {
    document.getElementById("most").value = most;
    document.getElementById("seed").value = 1;
    document.getElementById("message").value = text;
    document.getElementById("composer").requestSubmit();
})(%s)"""
ANSWER = "document.querySelector('.message.assistant:last-child .said')?.textContent"
SERIOUS = """axe.run().then(({ violations }) => violations
    .filter(({ impact }) => ["serious", "critical"].includes(impact))
    .map(({ id, nodes }) => [id, ...nodes.map(({ html }) => html)]))"""
IS_WRITING = "document.querySelector('.message.waiting')"


class Served(NamedTuple):
    page: Page
    nodes: list[Node]
    url: str
    locked_url: str


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """One browser for all tests, a server that is open to it, and one that wants a key."""
    bundle = Bundle.load(DEMO_BUNDLE)
    async with nodes_of(bundle) as (nodes, origin):

        async def search() -> list[Announcement]:
            return found_of(nodes)

        async with GenerationService(origin, bundle, search) as service:
            apps = []
            for guard in (Guard(), Guard(keys=ApiKeyBook())):
                chat = ChatTemplate.of_bundle(bundle)
                built = build_app(service, guard, chat=chat, viewed=Viewed(service, lambda: ADVICE))
                apps.append(await serve_app(built, cancels_on_disconnect=True))
            try:
                async with browsing(tmp_path_factory.mktemp("browser")) as page:
                    yield Served(page, nodes, *(f"http://127.0.0.1:{app.port}/" for app in apps))
            except NoBrowserError as cause:
                pytest.skip(str(cause))
            finally:
                await asyncio.gather(*(app.close() for app in apps))


@pytest_asyncio.fixture(loop_scope="module")
async def page(served: Served) -> AsyncIterator[Page]:
    """The page as a newcomer sees it, at a desk in the light; nothing may go wrong in it."""
    await served.page.show(**DESKTOP)
    await served.page.go(served.url)
    await served.page.run("sessionStorage.clear()")
    await served.page.go(served.url)
    served.page.faults.clear()
    yield served.page
    assert served.page.faults == []


def say(text: str, most: int = 40) -> str:
    return SAY % f"{json.dumps(text)}, {most}"


async def pixels(page: Page, canvas: str) -> int:
    """How many pixels of a picture are not empty."""
    script = """(() => {
        const canvas = document.getElementById("%s");
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return data.filter((_, at) => at %% 4 === 3 && data[at]).length;
    })()"""
    return int(await page.run(script % canvas))


async def test_a_dialogue_is_written_stopped_edited_and_written_anew(page: Page) -> None:
    await page.until("document.getElementById('model').textContent === 'demo-python-6m'")
    await page.run(say("def main(argv):"))
    await page.until(f"{ANSWER} && !{IS_WRITING}")
    note = await page.run("document.querySelector('.message.assistant .what').textContent")
    assert note.startswith("40 tokens, ") and "per verification" in note

    await page.run(say("x = 1", most=900))
    await page.until(f"document.querySelectorAll('.assistant').length === 2 && {ANSWER}.length > 20")
    await page.run("document.getElementById('stop').click()")
    await page.until(f"!{IS_WRITING}")
    assert await page.run("document.querySelector('.assistant:last-child .what').textContent") == "stopped"

    before = await page.run(ANSWER)
    await page.run("document.getElementById('most').value = 12")
    await page.run("[...document.querySelectorAll('.assistant:last-child button')].at(-1).click()")
    await page.until(f"{IS_WRITING} || {ANSWER} !== {json.dumps(before)}")
    await page.until(f"{ANSWER} && !{IS_WRITING}")
    assert await page.run("document.querySelectorAll('.message').length") == 4

    await page.run("document.querySelector('.user button').click()")
    await page.run("""(() => {
        document.querySelector(".edit textarea").value = "import os";
        document.querySelector(".edit").requestSubmit();
    })()""")
    await page.until(f"document.querySelectorAll('.message').length === 2 && {ANSWER} && !{IS_WRITING}")
    assert await page.run("document.querySelector('.user .said').textContent") == "import os"
    assert await page.run("document.activeElement.id") == "message", "the keyboard is where one goes on"


async def test_tree_lanes_and_ring_move_while_a_text_is_written_and_stand_still_behind_it(
    page: Page, served: Served
) -> None:
    await page.run(say("def main(argv):", most=500))
    await page.until(
        "/^[1-9]\\d* tokens written, \\d+ rows drafted/.test(document.getElementById('tree-words').textContent)"
    )
    await page.until(f"document.querySelectorAll('#ring-picture .load').length === {len(served.nodes)}")
    await page.until(f"document.querySelector('#boards tbody').rows.length === {len(served.nodes)}")
    await page.until("Number(document.getElementById('rate').textContent) > 0")
    await page.until("Number(document.getElementById('acceptance').textContent) >= 1")
    for canvas in ("tree-canvas", "lanes-canvas"):
        assert await pixels(page, canvas) > 1000, canvas
    await page.run("document.getElementById('stop').click()")
    await page.until("document.getElementById('tree-words').textContent === 'No text is being written.'")
    await page.until("document.getElementById('state').textContent === 'ready'")
    names = await page.run("[...document.querySelectorAll('#boards tbody th')].map((cell) => cell.textContent)")
    assert sorted(names) == sorted(node.announcement.node for node in served.nodes)


async def test_what_the_network_says_is_text(page: Page) -> None:
    await page.until("document.querySelector('#advice-list .command')")
    assert await page.run("document.querySelector('#advice-list strong').textContent") == "<b>shed</b>: firewall"
    assert await page.run("document.querySelector('#advice-list b')") is None
    dark = await page.run("document.querySelector('#advice-list .code path').getAttribute('d')")
    assert dark == "M0 0h1v1h-1zM2 0h1v1h-1zM1 1h1v1h-1z"
    shown = await page.run("""import("/page/markdown.js").then(({ showMarkdown }) => {
        const node = document.createElement("div");
        showMarkdown(node, `# A *title*

one <img src=x onerror=alert(1)> **two** \\`<i>\\` __init__ [bad](javascript:alert(1)) [good](https://a.example/?q=1)

- first
- second
  1. below

| a | b |
|---|---|
| 1 | 2 |

\\`\\`\\`python
if a < b:
    pass
\\`\\`\\``);
        return node.innerHTML;
    })""")
    assert "<h3>A <em>title</em></h3>" in shown
    assert "one &lt;img src=x onerror=alert(1)&gt; <strong>two</strong> <code>&lt;i&gt;</code>" in shown
    assert "__init__ [bad](javascript:alert(1))" in shown
    assert 'href="https://a.example/?q=1" target="_blank" rel="noopener noreferrer"' in shown
    assert "<ul><li>first</li><li>second<div><ol><li>below</li></ol></div></li></ul>" in shown
    assert "<td>2</td>" in shown and "<pre><code>if a &lt; b:\n    pass</code></pre>" in shown


async def test_it_fits_phones_and_desks_by_day_and_night_and_shuts_nobody_out(page: Page) -> None:
    await page.run(say("def main(argv):"))
    await page.until(f"{ANSWER} && !{IS_WRITING}")
    axe = await asyncio.to_thread(lambda: gzip.decompress(AXE.read_bytes()).decode())
    await page.run(f"(() => {{ {axe} }})()")
    grounds = set()
    for shape, is_dark, tab in LOOKS:
        await page.show(**shape, is_dark=is_dark)
        await page.until(f"innerWidth === {shape['width']}")
        await page.run(f"document.querySelector('.tabs [data-tab={tab}]').click()")
        assert await page.run("document.documentElement.scrollWidth <= innerWidth")
        grounds.add(await page.run("getComputedStyle(document.body).backgroundColor"))
        assert await page.run(SERIOUS) == [], (shape, is_dark, tab)
    assert len(grounds) == 2, "light and dark"


async def test_where_a_key_is_wanted_it_is_asked_for_and_kept_in_the_tab(served: Served) -> None:
    page = served.page
    await page.show(**DESKTOP)
    await page.go(served.locked_url)
    await page.until("document.getElementById('key-dialog').open")
    await page.run(f"document.getElementById('key').value = '{add_api_key('page')}'")
    await page.run("document.querySelector('#key-dialog form').requestSubmit()")
    await page.until("document.getElementById('model').textContent === 'demo-python-6m'")
    await page.go(served.locked_url)
    await page.until("document.getElementById('model').textContent === 'demo-python-6m'")
    assert not await page.run("document.getElementById('key-dialog').open")


async def test_a_board_that_is_lost_is_shown_and_its_text_goes_on(page: Page, served: Served) -> None:
    await page.run(say("def main(argv):", most=150))
    await page.until(f"document.querySelector('#ring-picture .load') && {IS_WRITING}")
    lost = served.nodes.pop()  # tests may come in any order
    await lost.close()
    await page.until(f"document.getElementById('others').textContent.includes('{lost.announcement.node} is lost')")
    await page.until(f"{ANSWER} && !{IS_WRITING}")
    note = await page.run("document.querySelector('.message.assistant .what').textContent")
    assert note.startswith("150 tokens, ")
    await page.until(f"document.querySelectorAll('#ring-picture .load').length === {len(served.nodes)}")
