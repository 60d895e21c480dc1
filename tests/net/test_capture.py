"""What an outsider on the LAN hears while a ring answers: nothing of tokens and tensors. Without a key, all of it."""

import asyncio
import json
from collections.abc import Sequence

import numpy as np
import pytest

from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.core.events import RunForward
from flowspec_edge.core.rows import NO_PARENT, Row
from flowspec_edge.core.speculation.kv_slots import KvSlots
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.net.auth import make_key
from tests.lan import captured, lan_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("lan_is_possible")]

PROMPT = "class Orchard:\n    def __init__(self, apples, pears):\n        self.apples = apples\n"


def without_mask(data: bytes) -> bytes:
    """The XOR of bytes that are four apart, which does not change when a WebSocket client masks what it sends.

    The client XORs its bytes with four others over and over.
    """
    values = np.frombuffer(data, np.uint8)
    return (values[4:] ^ values[:-4]).tobytes()


def secrets_of(prompt: str) -> dict[str, bytes]:
    """Bytes that a ring of two sends for this prompt, by what they are."""
    bundle = Bundle.load(DEMO_BUNDLE)
    manifest = bundle.manifest
    ids = Tokenizer(DEMO_BUNDLE / manifest.tokenizer.file).encode(prompt)
    runner = StageRunner(DEMO_BUNDLE, manifest, 0, manifest.geometry.num_layers // 2)
    slots = KvSlots(len(ids))
    runner.open_cache(0, slots.capacity)
    rows = [Row(i, i - 1 if i else NO_PARENT, token) for i, token in enumerate(ids)]
    hidden = runner.run(RunForward(0, tuple(rows), None, slots.place(rows))).hidden
    return {
        "tokens": np.array(ids, "<u4").tobytes(),
        "tensor": np.ascontiguousarray(hidden[2, :64]).tobytes(),
        "tensor of the last row": np.ascontiguousarray(hidden[-1, :64]).tobytes(),
        "text": prompt.encode(),
    }


async def heard_of_an_answer(*options: str) -> tuple[list[bytes], list[bytes]]:
    """Everything that crossed the switch, and how many tokens were written."""
    async with lan_of(3) as lan, asyncio.timeout(120):
        with captured(lan) as capture:
            await asyncio.gather(*(lan.start_node(number, *options) for number in (1, 2)))
            status, out, err = await lan.run(
                0,
                *("generate", PROMPT, "--nodes", "2", "--max-new-tokens", "8", "--json", "--equal-split", *options),
            )
            assert status == 0, err
        streams = capture.streams()
    report = json.loads(out)
    assert len(report["token_ids"]) == 8
    assert len(report["ring"]) == 2
    return streams, capture.frames


def found_in(streams: Sequence[bytes], secret: bytes) -> bool:
    masked = without_mask(secret)
    return any(secret in stream or masked in without_mask(stream) for stream in streams if len(stream) > 4)


async def test_an_outsider_hears_neither_tokens_nor_tensors() -> None:
    secrets = secrets_of(PROMPT)
    key, _ = make_key()
    streams, frames = await heard_of_an_answer()
    assert sum(map(len, streams)) > 40_000  # the ring's traffic was heard
    assert [name for name, secret in secrets.items() if found_in(streams, secret)] == []
    assert not any(key in frame or b"Orchard" in frame for frame in frames)


async def test_the_same_capture_without_a_key_holds_them_all() -> None:
    """What the test above looks for can be found: this is what ``--insecure`` warns of."""
    secrets = secrets_of(PROMPT)
    del secrets["text"]  # a ring sends token ids
    streams, _ = await heard_of_an_answer("--host", "0.0.0.0", "--insecure")
    assert [name for name, secret in secrets.items() if not found_in(streams, secret)] == []
