"""The prompts of the comparison: six sets of source text that the demo model was not trained on (see PROMPTS.md)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from flowspec_edge.errors import BenchError

PROMPTS = Path(__file__).parent / "prompts.json"


def load_prompts() -> Mapping[str, Sequence[str]]:
    """The prompts' texts by set."""
    sets = json.loads(PROMPTS.read_text(encoding="utf-8"))
    return {name: [prompt["text"] for prompt in prompts] for name, prompts in sets.items()}


def choose_sets(names: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """The sets of these names.

    Raises:
        BenchError: there is no such set.
    """
    sets = load_prompts()
    for name in names:
        if name not in sets:
            raise BenchError(f"prompt set {name!r} is not known; choose quick, all, or some of {', '.join(sets)}")
    return {name: sets[name] for name in names}
