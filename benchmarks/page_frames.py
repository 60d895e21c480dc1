"""Whether the page's pictures move at 30 frames a second on a phone, while a text is written over a real ring.

    python -m benchmarks.page_frames                    a Chromium as slow as a phone: four times, and eight times
    python -m benchmarks.page_frames --slower 1,6 --seconds 20 --json

Four nodes of this machine take the time of four Raspberry Pi 5, so that they leave the processor to the browser. That
is a headless Chromium in the size of a phone, with a finger for a pointer, whose scripts and layout are held up so many
times (DevTools' CPU throttling); it draws without a graphics processor. ``frames/s`` counts pictures of the draft tree,
of which phones get 30. ``95 %`` is how long 19 of 20 gaps between two of them were at most, and ``script`` how long a
frame's script takes on average. Needs Chromium.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from flowspec_edge.bench.report import format_table
from flowspec_edge.bundle import DEMO_BUNDLE
from flowspec_edge.net.addresses import LOOPBACK
from flowspec_edge.node.process import node_processes
from tests.web.browser import CHROMIUM, Page, browsing

TESTBED, NUM_NODES = "pi5x4-3b-int4", 4
PORT = 18790
SLOWER, SECONDS = "4,8", 10.0
PHONE_WIDTH, PHONE_HEIGHT = 390, 844
NUM_TOKENS = 1000
PROMPT = "class Stack:\n    "
HEADER = ["times as slow", "frames/s", "gap, median", "95 %", "script"]
WATCH = """
window.drawn = []; window.spent = [];
const clear = CanvasRenderingContext2D.prototype.clearRect;
CanvasRenderingContext2D.prototype.clearRect = function (...box) {
  if (this.canvas.id === "tree-canvas") drawn.push(performance.now());
  return clear.apply(this, box);
};
const request = window.requestAnimationFrame;
window.requestAnimationFrame = (step) => request((time) => {
  const before = drawn.length, began = performance.now();
  step(time);
  if (drawn.length > before) spent.push(performance.now() - began);
});
"""
ASK = f"""
document.getElementById("most").value = {NUM_TOKENS};
document.getElementById("message").value = {json.dumps(PROMPT)};
document.getElementById("composer").requestSubmit();
document.querySelector("[data-tab=ring]").click();
"""
IS_WRITING = "document.querySelector('.message.waiting') && drawn.length > 30"


@contextlib.asynccontextmanager
async def server() -> AsyncIterator[str]:
    """The address of the page of a ring of boards."""
    async with node_processes(NUM_NODES, DEMO_BUNDLE, "--emulate", TESTBED) as (cluster, _):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "flowspec_edge", "serve", "--cluster", cluster, "--host", LOOPBACK),
            *("--port", str(PORT), "--nodes", str(NUM_NODES), "--no-layers", "--equal-split"),
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        try:
            async for line in process.stdout:
                if b"http://" in line:
                    break
            yield f"http://{LOOPBACK}:{PORT}/"
        finally:
            process.terminate()
            await process.communicate()


async def measure(page: Page, url: str, slower: float, seconds: float) -> dict[str, Any]:
    """The frames of so many seconds in the middle of a text."""
    await page.send("Emulation.setCPUThrottlingRate", rate=slower)
    await page.go(url)
    await page.run(ASK)
    await page.until(IS_WRITING)
    await page.run("drawn.length = spent.length = 0")
    await asyncio.sleep(seconds)
    drawn, spent = await page.run("[drawn, spent]")
    await page.run("document.getElementById('stop').click()")
    gaps = [later - earlier for earlier, later in itertools.pairwise(drawn)]
    return {
        "slower": slower,
        "frames_per_s": 1000 * len(gaps) / sum(gaps),
        "gap_ms": statistics.median(gaps),
        "long_gap_ms": statistics.quantiles(gaps, n=20)[-1],
        "script_ms": statistics.mean(spent),
    }


async def compare(slower: list[float], seconds: float) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        async with server() as url, browsing(Path(folder)) as page:
            await page.show(width=PHONE_WIDTH, height=PHONE_HEIGHT, is_phone=True)
            await page.send("Emulation.setTouchEmulationEnabled", enabled=True)
            await page.send("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
            return [await measure(page, url, rate, seconds) for rate in slower]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slower", default=SLOWER, help="how many times, with commas (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if CHROMIUM is None:
        raise SystemExit("page_frames: there is no chromium here: apt-get install chromium")
    rows = asyncio.run(compare([float(rate) for rate in options.slower.split(",")], options.seconds))
    if options.json:
        print(json.dumps({"rows": rows}))
        return
    cells = [
        [f"{row['slower']:g}", f"{row['frames_per_s']:.1f}"]
        + [f"{row[name]:.1f} ms" for name in ("gap_ms", "long_gap_ms", "script_ms")]
        for row in rows
    ]
    print(format_table(HEADER, cells))


if __name__ == "__main__":
    main()
