"""Nodes wait for an origin that stands still, since a library holds its interpreter's lock for seconds: as those do
that read a large tokenizer, and make what grammars need of it.
"""

import asyncio
import ctypes
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.config import GenerateOptions, Grammar, Piece
from flowspec_edge.engine.grammar import Grammars
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.net.directory import find_peers
from flowspec_edge.node.node import Node
from flowspec_edge.node.process import SEARCH_S, node_processes
from flowspec_edge.node.resources import NodeSettings
from flowspec_edge.origin import engine
from flowspec_edge.origin.opening import open_ring
from flowspec_edge.version import __version__
from tests.ring.conftest import tokens_of, unsplit_tokens

STILL_S = 2.5
"""Longer than any node waits for an answer."""
PROMPT = "def main(argv):"


def hold_the_lock() -> None:
    """As a library does that was written without a thought of other threads."""
    ctypes.PyDLL(None).usleep(int(STILL_S * 1e6))


async def test_a_ring_is_opened_and_stays_open_though_its_origin_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    num_held = 0

    class SlowTokenizer(Tokenizer):
        def __init__(self, path: Path, max_tokens: int | None = None) -> None:
            nonlocal num_held
            hold_the_lock()
            num_held += 1
            super().__init__(path, max_tokens)

    def make_slowly(grammars: Grammars) -> Any:
        nonlocal num_held
        hold_the_lock()
        num_held += 1
        return make_at_once(grammars)

    monkeypatch.setattr(engine, "Tokenizer", SlowTokenizer)
    make_at_once = vars(Grammars)["_tokens"].func
    monkeypatch.setattr(Grammars, "_tokens", property(make_slowly))
    bundle = Bundle.load(DEMO_BUNDLE)
    options = GenerateOptions(max_new_tokens=24, grammar=Grammar("choice", json.dumps(["    return 0", "    pass"])))
    async with node_processes(2, DEMO_BUNDLE) as (cluster, _):
        settings = NodeSettings(name="origin", cluster=cluster, bundles=(bundle,), is_announced=False)
        found = await find_peers(
            settings.neighbourhood, node=settings.name, version=__version__, num_nodes=2, timeout_s=SEARCH_S
        )
        node = await Node.start(settings)
        try:
            async with open_ring(node, bundle, found) as ring:
                plain = GenerateOptions(max_new_tokens=300)
                writing = asyncio.create_task(_written(ring.generate(PROMPT, plain)))
                await asyncio.sleep(0.1)
                chosen = [piece async for piece in ring.generate(PROMPT, options)]
                tokens = await writing
                assert ring.is_open and ring.loss is None
                prompt = ring.tokenizer.encode(PROMPT)
        finally:
            await node.close()
    assert num_held == 2
    assert tokens == unsplit_tokens(bundle, prompt, plain)
    assert "".join(piece.text for piece in chosen) in ("    return 0", "    pass")


async def _written(pieces: AsyncIterator[Piece]) -> list[int]:
    return tokens_of([piece async for piece in pieces])
