"""``flowspec demo``: nodes on this machine answer a prompt, and the text is held against the unsplit model's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import Any

from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.cli.json_report import PartlyDoneError
from flowspec_edge.cli.show_ring import TripDisplay, print_ring, print_statistics, ring_table
from flowspec_edge.config import GenerateOptions, Piece
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.engine.unsplit import UnsplitModel
from flowspec_edge.errors import FlowspecError
from flowspec_edge.net.directory import find_peers
from flowspec_edge.node.node import Node
from flowspec_edge.node.process import SEARCH_S, node_processes
from flowspec_edge.node.resources import NodeSettings, unique_name
from flowspec_edge.origin.opening import open_ring
from flowspec_edge.origin.ring import Ring
from flowspec_edge.version import __version__

PROMPT = '''class Stack:
    """A last-in, first-out container."""

    def __init__(self, items=()):
        self.items = list(items)

    def push(self, item):
'''


async def run_demo(
    *, num_nodes: int, bundle: Bundle, prompt: str | None, options: GenerateOptions, is_json: bool
) -> int:
    """Answer ``prompt`` with nodes that are started for it, and compare the text with the unsplit model's.

    Returns an exit status: 1 where the texts differ.
    """
    prompt = prompt or PROMPT
    began = time.monotonic()

    def report(line: str) -> None:
        if not is_json:
            print(line, flush=True)

    report(f"starting {num_nodes} nodes on this machine ...")
    async with node_processes(num_nodes, bundle.directory) as (cluster, _):
        report(f"looking for them by mDNS (cluster {cluster}) ...")
        settings = NodeSettings(name=unique_name(), cluster=cluster, bundles=(bundle,), is_announced=False)
        found = await find_peers(
            settings.neighbourhood,
            node=settings.name,
            version=__version__,
            num_nodes=num_nodes,
            timeout_s=SEARCH_S,
        )
        node = await Node.start(settings)
        try:
            async with open_ring(node, bundle, found) as ring:
                stages = ring_table(ring.stages)
                if not is_json:
                    print_ring(stages, bundle.manifest.drafts)
                    print(f"\nprompt:\n{prompt}\n")
                display = None if is_json else TripDisplay(began)
                pieces = await _answer(ring, prompt, options, display)
        finally:
            await node.close()
    return await _report(bundle, prompt, options, pieces, stages, display)


async def _report(
    bundle: Bundle,
    prompt: str,
    options: GenerateOptions,
    pieces: list[Piece],
    stages: list[dict[str, Any]],
    display: TripDisplay | None,
) -> int:
    """Print what was done, as JSON where there is no display. Returns 1 where the text is not the unsplit model's."""
    written = _written(pieces)
    tokens = written["token_ids"]
    statistics = pieces[-1].statistics
    assert statistics is not None, "the last piece of an answer has the statistics"
    unsplit = await asyncio.to_thread(unsplit_tokens, bundle, prompt, options)
    if options.stop:  # the unsplit model knows no stop strings
        unsplit = unsplit[: len(tokens)]
    is_identical = tokens == unsplit
    if display is None:
        report = {
            "nodes": len(stages),
            "prompt": prompt,
            **written,
            "autoregressive_token_ids": unsplit,
            "identical": is_identical,
            "acceptance_length": statistics["acceptance_length"],
            "trips": statistics["trips"],
            "rows_sent": statistics["rows_sent"],
            "rows_useful": statistics["rows_useful"],
            "tokens_per_s": statistics["tokens_per_s"],
            "ring": stages,
        }
        print(json.dumps(report))
    else:
        print(f"\n{prompt}{written['text']}\n")
        print_statistics(statistics)
        print(f"from the command to the first token {display.first_token_s:.1f} s, in all {display.total_s:.1f} s")
        print("identical to the unsplit model: " + ("yes, token for token" if is_identical else "NO"))
        if bundle.directory == DEMO_BUNDLE:
            print("A real chat model, and a page on which its draft tree is seen, from a clone: make chat")
    return 0 if is_identical else 1


def _written(pieces: list[Piece]) -> dict[str, Any]:
    return {
        "text": "".join(piece.text for piece in pieces),
        "token_ids": [token for piece in pieces for token in piece.token_ids],
    }


async def _answer(ring: Ring, prompt: str, options: GenerateOptions, display: TripDisplay | None) -> list[Piece]:
    pieces: list[Piece] = []
    answering = ring.generate(prompt, options, display.show_trip if display else None)
    try:
        async with contextlib.aclosing(answering) as answer:
            async for piece in answer:
                pieces.append(piece)
                if display is not None:
                    display.take_text(piece.text)
    except FlowspecError as cause:
        raise PartlyDoneError({"prompt": prompt, **_written(pieces), "ring": ring_table(ring.stages)}, cause) from cause
    if display is not None:
        display.finish()
    return pieces


def unsplit_tokens(bundle: Bundle, prompt: str, options: GenerateOptions) -> list[int]:
    """What the plain model writes in one process, which the ring's text is compared with."""
    tokenizer = Tokenizer(bundle.directory / bundle.manifest.tokenizer.file)
    return list(UnsplitModel(bundle.directory, bundle.manifest).generate(tokenizer.encode(prompt), options))
