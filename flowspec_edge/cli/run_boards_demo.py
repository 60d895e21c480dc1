"""``flowspec demo --boards``: nodes of this machine, at the pace of described boards, answer a prompt twice: first
without drafts, then with them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import replace
from typing import Any

from flowspec_edge.bench.emulate import LATE_LIMIT, Emulation, emulated_boards
from flowspec_edge.bench.testbed import load_testbed
from flowspec_edge.bundle import Bundle
from flowspec_edge.cli.json_report import PartlyDoneError
from flowspec_edge.cli.run_demo import PROMPT, unsplit_tokens
from flowspec_edge.cli.show_boards_demo import Writing, WritingDisplay, display_of
from flowspec_edge.config import GenerateOptions
from flowspec_edge.errors import FlowspecError, RequestError

WITHOUT_DRAFTS = "autoregressive"


async def run_boards_demo(
    *, boards: str, bundle: Bundle, prompt: str | None, options: GenerateOptions, is_json: bool
) -> int:
    """Answer ``prompt`` on the testbed ``boards`` without drafts and with the schedule of the ``options``.

    Returns an exit status: 1 where a text is not the unsplit model's.

    Raises:
        TestbedError: there is no such testbed. RequestError: the schedule has no drafts.
        FlowspecError: the boards could not be started, or a text failed.
    """
    testbed = load_testbed(boards)
    if options.schedule == WITHOUT_DRAFTS:
        raise RequestError(f"--boards compares a schedule with {WITHOUT_DRAFTS}; name another one, or leave it out")
    prompt = prompt or PROMPT
    writings = [Writing("without drafts", WITHOUT_DRAFTS), Writing("with drafts", options.schedule)]
    display = display_of(f"{testbed.name}: {testbed.summary}", prompt, writings, is_quiet=is_json)
    display.say(f"starting {len(testbed.stages)} nodes on this machine at the pace of {testbed.name} ...")
    try:
        async with emulated_boards(testbed, boards, bundle) as emulation:
            with display:
                for writing in writings:
                    await _write(emulation, prompt, options, writing, display)
    except FlowspecError as cause:
        raise PartlyDoneError(_report(testbed.name, prompt, writings), cause) from cause
    unsplit = await asyncio.to_thread(unsplit_tokens, bundle, prompt, options)
    if options.stop:  # the unsplit model knows no stop strings
        unsplit = unsplit[: len(writings[0].token_ids)]
    is_identical = all(writing.token_ids == unsplit for writing in writings)
    if is_json:
        print(json.dumps({**_report(testbed.name, prompt, writings), "identical": is_identical}))
    else:
        display.conclude(is_identical=is_identical, late_limit=LATE_LIMIT)
    return 0 if is_identical else 1


async def _write(
    emulation: Emulation, prompt: str, options: GenerateOptions, writing: Writing, display: WritingDisplay
) -> None:
    """Write one text on a ring of its own, which has learned nothing from the other text."""
    chosen = replace(options, schedule=writing.schedule)
    async with emulation.ring() as (ring, engine):
        async with contextlib.aclosing(ring.generate(prompt, chosen)) as answer:
            async for piece in answer:
                writing.add(piece)
                display.show(writing)
        writing.late = (await emulation.told_lateness(engine)).share


def _report(boards: str, prompt: str, writings: list[Writing]) -> dict[str, Any]:
    without, with_drafts = writings
    gain = with_drafts.tokens_per_s / without.tokens_per_s if without.tokens_per_s else None
    return {
        "boards": boards,
        "prompt": prompt,
        "without_drafts": without.to_report(),
        "with_drafts": with_drafts.to_report(),
        "gain": None if gain is None else round(gain, 3),
    }
