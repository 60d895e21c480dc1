"""The prompts of the comparison: six sets of source text that the demo model was not trained on (see PROMPTS.md), and
six of messages to a chat model, on which no draft head is trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from flowspec_edge.errors import BenchError

PROMPTS = Path(__file__).parent / "prompts.json"
CHAT_PROMPTS = Path(__file__).parent / "chat_prompts.txt"
"""A message a line, in which ``\\n`` stands for a line break, below the name of its set."""
_NAME = re.compile(r"# (\w+)")


def load_prompts() -> Mapping[str, Sequence[str]]:
    """The sets of source text: the prompts' texts by set."""
    sets = json.loads(PROMPTS.read_text(encoding="utf-8"))
    return {name: [prompt["text"] for prompt in prompts] for name, prompts in sets.items()}


def load_chat_prompts() -> Mapping[str, Sequence[str]]:
    """The sets of messages, by set."""
    sets: dict[str, list[str]] = {}
    texts: list[str] = []
    for line in CHAT_PROMPTS.read_text(encoding="utf-8").splitlines():
        if (named := _NAME.fullmatch(line)) is not None:
            texts = sets.setdefault(named[1], [])
        elif not line.startswith("#"):
            texts.append(line.replace("\\n", "\n"))
    return sets


def choose_sets(names: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """The sets of these names, of either kind.

    Raises:
        BenchError: there is no such set.
    """
    sets = {**load_prompts(), **load_chat_prompts()}
    for name in names:
        if name not in sets:
            raise BenchError(f"prompt set {name!r} is not known; choose quick, all, or some of {', '.join(sets)}")
    return {name: sets[name] for name in names}
