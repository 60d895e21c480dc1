"""Prompts of source text that the demo model was not trained on."""

import json
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

from flowspec_edge.bundle import DEMO_BUNDLE
from flowspec_edge.engine.tokenizer import Tokenizer

VAL_FILES = Path(__file__).parents[1] / "exporter/demo_model/val_files.json"
NUM_PROMPTS = 20
PROMPT_TOKENS = 100


def held_out_prompts() -> list[list[int]]:
    """Token ids of 20 prompts of 100 tokens each, spread evenly over the held-out files of the standard library."""
    tokenizer = Tokenizer(DEMO_BUNDLE / "tokenizer.json")
    tokens = tokenizer.encode("".join(_read(name) for name in json.loads(VAL_FILES.read_text())))
    step = len(tokens) // NUM_PROMPTS
    return [tokens[start : start + PROMPT_TOKENS] for start in range(0, step * NUM_PROMPTS, step)]


def _read(name: str) -> str:
    """A module of the standard library or a topic of pydoc's; empty where this Python no longer has it."""
    if name.startswith("topics/"):
        return topics.get(name.removeprefix("topics/"), "")
    path = Path(sysconfig.get_path("stdlib")) / name
    return path.read_text(encoding="utf-8") if path.exists() else ""
