"""The prompts that come along, and those that users bring: one a line, in UTF-8.

``{one|another}`` in a line stands for each of these, ``\\n`` for a line break, and lines that begin with ``#`` are left
out.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from exporter.source import Source
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.errors import TrainingError
from flowspec_edge.web.chat_template import ChatTemplate

DIRECTORY = Path(__file__).parent / "prompts"
KINDS = ("explain", "list", "rewrite", "code", "json", "story")
HELD_OUT = Path(__file__).parents[2] / "flowspec_edge/bench/chat_prompts.txt"
EVERY = 10
"""Of the prompts that users bring, one in so many is held out."""
_CHOICE = re.compile(r"\{([^{}|]*(?:\|[^{}|]*)+)\}")


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file.

    Raises:
        TrainingError: it cannot be read, or has none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as cause:
        raise TrainingError(f"{path}: not readable as UTF-8 text ({cause})") from cause
    prompts = [p for line in lines if line.strip() and not line.startswith("#") for p in _expanded(line.strip())]
    if not prompts:
        raise TrainingError(f"{path}: has no prompts; each is a line of its own")
    return list(dict.fromkeys(prompts))


def trained_and_held_out(paths: Sequence[Path]) -> tuple[list[str], list[str]]:
    """The prompts of files, or those that come along; those of the different files take turns."""
    read = [read_prompts(path) for path in paths or [DIRECTORY / f"{kind}.txt" for kind in KINDS]]
    in_turn = [prompt for prompts in itertools.zip_longest(*read) for prompt in prompts if prompt is not None]
    if not paths:
        return in_turn, read_prompts(HELD_OUT)
    return [p for n, p in enumerate(in_turn) if (n + 1) % EVERY], in_turn[EVERY - 1 :: EVERY]


class Chats:
    """Writes a prompt as the model's template has it, as ``flowspec serve`` does; base models get it as it is."""

    def __init__(self, source: Source, tokenizer: Path) -> None:
        self._tokenizer = Tokenizer(tokenizer)
        self._template = None
        if source.chat_template is not None:
            self._template = ChatTemplate.of_tokenizer(
                source.chat_template, tokenizer, source.bos_token_id, source.eos_token_ids
            )

    def tokens_of(self, prompt: str) -> list[int]:
        if self._template is None:
            return self._tokenizer.encode(prompt)
        return self._tokenizer.encode(self._template.render_message(prompt))


def _expanded(line: str) -> Iterator[str]:
    parts = _CHOICE.split(line)  # texts, and choices between them
    choices = [part.split("|") if place % 2 else [part] for place, part in enumerate(parts)]
    for chosen in itertools.product(*choices):
        yield "".join(chosen).replace("\\n", "\n")
