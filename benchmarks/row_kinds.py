"""What a text loses where hidden rows travel in 16 bits: perplexity, and how often the likeliest token stays the same.

    python -m benchmarks.row_kinds                                the demo model
    python -m benchmarks.row_kinds --bundle DIR --precision q8    another bundle

The prompts of ``flowspec bench`` run through the bundle's layers, which are cut into some numbers of stages of equal
size; rows are rounded where they leave a stage, as on a ring. All is compared with rows in float32.
"""

from __future__ import annotations

import argparse
import itertools
import json
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowspec_edge.bench.prompts import load_prompts
from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.config import ROW_KINDS, RowKind
from flowspec_edge.core.events import RunForward
from flowspec_edge.core.row_kinds import narrow, widen
from flowspec_edge.core.rows import NO_PARENT, Floats, Hidden, Row
from flowspec_edge.core.speculation.kv_slots import KvSlots
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.errors import RowsTooLargeError

NUM_STAGES = (2, 4, 8)
MAX_TOKENS = 128
"""Of each text: one chunk of a prompt."""


class Cut:
    """A bundle's layers in that many stages, and its head."""

    def __init__(self, bundle: Bundle, num_stages: int, precision: str | None) -> None:
        manifest = bundle.manifest
        edges = np.linspace(0, manifest.geometry.num_layers, num_stages + 1).round().astype(int).tolist()
        self._stages = [
            StageRunner(bundle.directory, manifest, start, stop, precision=precision)
            for start, stop in itertools.pairwise(edges)
        ]
        self._head = Head(bundle.directory, manifest, num_threads=1)
        self.largest = 0.0
        """The largest value of a row so far."""

    def logits(self, tokens: Sequence[int], kind: RowKind) -> Floats:
        """Those after each token, [tokens, vocab_size]. Raises RowsTooLargeError."""
        rows = tuple(Row(id, id - 1 if id else NO_PARENT, token) for id, token in enumerate(tokens))
        hidden: Hidden | None = None
        for stage in self._stages:
            stage.open_cache(1, len(rows))
            came = None if hidden is None else widen(hidden)
            found = stage.run(RunForward(1, rows, came, KvSlots(len(rows)).place(rows))).hidden
            stage.free_cache(1)
            self.largest = max(self.largest, float(np.abs(found).max()))
            hidden = narrow(found, kind)
        assert hidden is not None, "there are stages"
        return self._head.logits(widen(hidden))


def log_loss(logits: Floats, tokens: Sequence[int]) -> float:
    """The sum of the negative log-probabilities of all tokens but the first."""
    exact = logits[:-1].astype(np.float64)
    exact -= exact.max(axis=1, keepdims=True)
    chosen = exact[np.arange(len(exact)), tokens[1:]]
    return float((np.log(np.exp(exact).sum(axis=1)) - chosen).sum())


def measure(cut: Cut, texts: Sequence[Sequence[int]]) -> dict[str, dict[str, Any]]:
    """Of each kind of rows the perplexity, its change, and the share of positions with the same likeliest token."""
    losses, num_same = dict.fromkeys(ROW_KINDS, 0.0), dict.fromkeys(ROW_KINDS, 0)
    for text in texts:
        best: list[int] = []
        for kind in ROW_KINDS:  # float32 first
            try:
                logits = cut.logits(text, kind)
            except RowsTooLargeError:
                losses[kind] = float("nan")
                continue
            likeliest = logits.argmax(axis=1).tolist()
            best = best or likeliest
            losses[kind] += log_loss(logits, text)
            num_same[kind] += sum(map(operator.eq, likeliest, best))
    num_tokens = sum(map(len, texts))
    perplexity = {kind: float(np.exp(loss / (num_tokens - len(texts)))) for kind, loss in losses.items()}
    return {
        kind: {
            "perplexity": found,
            "change": found / perplexity["float32"] - 1,
            "same_token": num_same[kind] / num_tokens,
        }
        for kind, found in perplexity.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="instead of the demo model")
    parser.add_argument("--precision", help="one that the bundle has (default: its own)")
    parser.add_argument("--num-texts", type=int, default=40)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    bundle = Bundle.load(options.bundle or DEMO_BUNDLE)
    tokenizer = Tokenizer(bundle.directory / bundle.manifest.tokenizer.file)
    prompts = [text for several in load_prompts().values() for text in several]
    step = max(len(prompts) // options.num_texts, 1)
    texts = [tokenizer.encode(text)[:MAX_TOKENS] for text in prompts[::step][: options.num_texts]]
    found = {}
    for num_stages in NUM_STAGES:
        cut = Cut(bundle, num_stages, options.precision)
        found[num_stages] = measure(cut, texts)
        if not options.json:
            print(f"{num_stages} stages, {sum(map(len, texts))} tokens; the largest value is {cut.largest:g}")
            for kind, told in found[num_stages].items():
                print(
                    f"  {kind:9} perplexity {told['perplexity']:.4f} ({told['change']:+.4%}), "
                    f"same token {told['same_token']:.2%}"
                )
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
