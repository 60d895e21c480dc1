"""The plain model, with all layers in one process and one token after another. Every ring must write what it writes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from flowspec_edge.config import GenerateOptions
from flowspec_edge.core.events import RunForward
from flowspec_edge.core.limits import PREFILL_ROWS
from flowspec_edge.core.rows import NO_PARENT, Before, Row
from flowspec_edge.core.speculation.kv_slots import KvSlots
from flowspec_edge.core.speculation.verify import Sampler, noise_of
from flowspec_edge.engine.grammar import Grammars
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.manifest import Manifest


class UnsplitModel:
    """A bundle's target without ring, tree or drafter."""

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        *,
        num_threads: int = 1,
        precision: str | None = None,
        has_half_cache: bool = False,
    ) -> None:
        self._manifest = manifest
        layers = 0, manifest.geometry.num_layers
        self._stage = StageRunner(
            directory, manifest, *layers, num_threads=num_threads, precision=precision, has_half_cache=has_half_cache
        )
        self._head = Head(directory, manifest, num_threads=num_threads)
        self._directory = directory

    def generate(self, prompt: list[int], options: GenerateOptions) -> Iterator[int]:
        """Continue ``prompt`` token by token until a token that ends it, the limit, or the end of the context."""
        limit = min(options.max_new_tokens, self._manifest.geometry.max_context - len(prompt))
        eos = self._manifest.eos_token_ids
        constraint = None if options.grammar is None else self._grammars.compile(options.grammar)
        sampler = Sampler(options.for_drawing(eos), noise_of(self._manifest.geometry.vocab_size), constraint)
        slots = KvSlots(len(prompt) + limit)
        self._stage.open_cache(0, slots.capacity)
        try:
            tokens, num_run = list(prompt), 0
            for _ in range(limit):
                while num_run < len(tokens):
                    part = range(num_run, min(num_run + PREFILL_ROWS, len(tokens)))
                    hidden = self._run(slots, [Row(i, i - 1 if i else NO_PARENT, tokens[i]) for i in part])
                    num_run = part.stop
                before = Before(np.array(tokens, np.int64), len(prompt)) if options.looks_back else None
                tokens.append(sampler.draw(self._head.logits(hidden[-1:])[0], len(tokens), before))
                yield tokens[-1]
                if tokens[-1] in options.end_token_ids(eos):
                    return
        finally:
            self._stage.free_cache(0)

    @cached_property
    def _grammars(self) -> Grammars:
        geometry, path = self._manifest.geometry, self._directory / self._manifest.tokenizer.file
        return Grammars(Tokenizer(path), geometry.vocab_size, self._manifest.eos_token_ids)

    def _run(self, slots: KvSlots, rows: list[Row]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return self._stage.run(RunForward(0, tuple(rows), None, slots.place(rows))).hidden
