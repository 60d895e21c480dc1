"""A headless Chromium, driven by its own protocol over a WebSocket: https://chromedevtools.github.io/devtools-protocol."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import re
import shutil
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

from tests.narrowing import present

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE_S = 60.0
"""How long anything may take on a machine that does much else."""
MAX_MESSAGE_BYTES = 64 * 2**20
OPTIONS = (
    "--headless=new",
    "--remote-debugging-port=0",
    "--no-first-run",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    *(("--no-sandbox",) if os.geteuid() == 0 else ()),  # it refuses to be started by root with one
)


class NoBrowserError(Exception):
    """The browser does not start here."""


class ScriptError(Exception):
    """What a script of a test raised in the page."""


class Page:
    """The one tab of a browser. ``faults`` are its errors: uncaught ones, and those that its console tells of."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._session: str | None = None
        self._has_loaded = asyncio.Event()
        self.faults: list[str] = []

    async def listen(self) -> None:
        """Take what the browser says, for as long as it says anything."""
        async for message in self._socket:
            told = json.loads(message.data)
            if "id" in told:
                if not (asked := self._asked.pop(told["id"])).done():
                    asked.set_result(told)
                continue
            match told["method"], told["params"]:
                case "Page.loadEventFired", _:
                    self._has_loaded.set()
                case "Runtime.exceptionThrown", {"exceptionDetails": fault}:
                    self.faults.append(str(fault.get("exception", {}).get("description", fault["text"])))
                case "Runtime.consoleAPICalled", {"type": "error", "args": parts}:
                    self.faults.append(str(parts))
                case "Log.entryAdded", {"entry": {"level": "error"} as entry}:
                    self.faults.append(f"{entry['text']} {entry.get('url', '')}")

    async def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol; its result."""
        number = next(self._numbers)
        self._asked[number] = asked = asyncio.get_running_loop().create_future()
        session = {} if self._session is None else {"sessionId": self._session}
        await self._socket.send_str(json.dumps({"id": number, "method": method, "params": parameters, **session}))
        async with asyncio.timeout(PATIENCE_S):
            told = await asked
        if "error" in told:
            raise ScriptError(f"{method}: {told['error']['message']}")
        result: dict[str, Any] = told["result"]
        return result

    async def attach(self) -> None:
        """Open the tab."""
        target = await self.send("Target.createTarget", url="about:blank")
        attached = await self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            await self.send(f"{domain}.enable")

    async def go(self, url: str) -> None:
        """Go to a page, with all of its files."""
        self._has_loaded.clear()
        await self.send("Page.navigate", url=url)
        async with asyncio.timeout(PATIENCE_S):
            await self._has_loaded.wait()

    async def run(self, script: str) -> Any:
        """The value of an expression in the page; promises are waited for. Raises ScriptError where it raises."""
        told = await self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in told:
            raise ScriptError(str(told["exceptionDetails"].get("exception", {}).get("description")))
        return told["result"].get("value")

    async def until(self, condition: str) -> Any:
        """The value of an expression as soon as it is true, looked at again and again."""
        looks = f"""new Promise((resolve, reject) => {{
            const end = performance.now() + {PATIENCE_S * 900};
            const look = () => {{
                try {{
                    const value = ({condition});
                    if (value) resolve(value);
                    else if (performance.now() > end) reject(new Error("it never came to be"));
                    else setTimeout(look, 15);
                }} catch (error) {{ reject(error); }}
            }};
            look();
        }})"""
        try:
            return await self.run(looks)
        except ScriptError as cause:
            raise ScriptError(f"{condition}: {cause}") from None

    async def show(self, *, width: int, height: int, is_dark: bool = False, is_phone: bool = False) -> None:
        """Have the window of that size, and the page in that light."""
        await self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if is_phone else 1,
            mobile=is_phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        await self.send("Emulation.setEmulatedMedia", features=[scheme])

    async def picture(self) -> bytes:
        """What is seen, as a PNG."""
        told = await self.send("Page.captureScreenshot", format="png")
        return base64.b64decode(told["data"])


@contextlib.asynccontextmanager
async def browsing(folder: Path) -> AsyncIterator[Page]:
    """A browser that keeps its files in that folder, and its tab."""
    assert CHROMIUM is not None, "look for it before"
    process = await asyncio.create_subprocess_exec(
        CHROMIUM, *OPTIONS, f"--user-data-dir={folder}", "about:blank", stdout=DEVNULL, stderr=PIPE
    )
    listening: asyncio.Task[None] | None = None
    try:
        said = b""
        async with asyncio.timeout(PATIENCE_S):
            while not (found := re.search(rb"ws://\S+", said)):
                if not (line := await present(process.stderr).readline()):
                    raise NoBrowserError(f"chromium does not start here: {said[-300:].decode(errors='replace')}")
                said += line
        reading = asyncio.create_task(present(process.stderr).read())  # or it would wait for somebody to read it
        async with (
            aiohttp.ClientSession() as client,
            client.ws_connect(found.group().decode(), max_msg_size=MAX_MESSAGE_BYTES) as socket,
        ):
            page = Page(socket)
            listening = asyncio.create_task(page.listen())
            await page.attach()
            yield page
            with contextlib.suppress(TimeoutError):
                page._session = None
                await page.send("Browser.close")
            reading.cancel()
    finally:
        if listening is not None:
            listening.cancel()
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await process.wait()
