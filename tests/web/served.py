"""The API on loopback, as every client of it is tried: all dialects, in front of a script."""

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple, Self

from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.config import Piece
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.net.server import serve_app
from flowspec_edge.web.app import build_app
from flowspec_edge.web.guard import Guard
from flowspec_edge.web.model_card import ModelCard
from tests.web.templates import template_of
from tests.web.test_completions import PIECES, ScriptedGenerator

Json = dict[str, Any]
HELLO: list[Json] = [{"role": "user", "content": "hello"}]
TOKENIZER = Tokenizer(DEMO_BUNDLE / "tokenizer.json")
CARD = dataclasses.replace(ModelCard.of_bundle(Bundle.load(DEMO_BUNDLE)), name=ScriptedGenerator.model)
REASONED = [
    *(Piece(text=text, token_ids=[5]) for text in ("<thi", "nk>\nhm", "\n</th", "ink>\n\n", "Yes", ".")),
    PIECES[-1],
]
"""An answer that begins with "hm" as its reasoning, and says "Yes."."""


class OneKey(NamedTuple):
    """A book of one key, whose text is its name."""

    name: str
    digest: str = ""

    def find(self, key: str) -> Self | None:
        return self if key == self.name else None

    def marked(self, mark: str) -> None:
        return None


@contextlib.asynccontextmanager
async def serving_dialects(
    script: Sequence[Piece | Exception | None] = PIECES,
    *,
    family: str | None = "Qwen 3",
    api_key: str | None = None,
    generator: ScriptedGenerator | None = None,
    **options: Any,
) -> AsyncIterator[tuple[ScriptedGenerator, str]]:
    """The scripted generator with a family's chat template, and the address of its API."""
    guard = Guard(keys=None if api_key is None else OneKey(api_key))
    generator = generator or ScriptedGenerator(script)
    template = template_of(family)

    async def coder() -> Tokenizer:
        return TOKENIZER

    app = build_app(generator, guard, chat=template, card=CARD, coder=coder, **options)
    served = await serve_app(app, cancels_on_disconnect=True)
    try:
        yield generator, f"http://127.0.0.1:{served.port}"
    finally:
        await served.close()


def parts_of(generator: ScriptedGenerator) -> list[str]:
    """The parts of the first prompt."""
    prompt = generator.asked[0][0]
    assert isinstance(prompt, list)
    return [part.text for part in prompt]


def prompt_of(generator: ScriptedGenerator) -> str:
    return "".join(parts_of(generator))
