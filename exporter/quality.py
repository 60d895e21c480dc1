"""Measures what a precision does to a text: its chain of blocks against float32 with the checkpoint's own weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from exporter.config import LayerShape
from exporter.parity import Expected, OnnxGraph, log_softmax, open_session
from exporter.reference import Reference, relative_error
from exporter.steps import Step, chain_steps
from flowspec_edge.manifest import HIDDEN, HIDDEN_OUT, LOGITS, TOP_K, Quality

MAX_TOKENS = 1024
"""Enough tokens for a perplexity within a few percent of a longer text's.

Every layer runs over them once per precision.
"""
CHUNK_ROWS = 128


class QualityCheck:
    """Takes the rows of one text through the layers, once in float32 and once with the files of each precision."""

    def __init__(self, text: str, token_ids: Sequence[int], embedding: np.ndarray, precisions: Iterable[str]) -> None:
        self.text = text
        self._tokens = np.array(token_ids[:MAX_TOKENS], np.int64)
        self._steps: list[Step] = chain_steps(self._tokens.tolist(), CHUNK_ROWS)
        self.capacity = max(step.num_slots for step in self._steps) + 1
        self._expected = [embedding[step.tokens].astype(np.float32)[None] for step in self._steps]
        self._found = {precision: list(self._expected) for precision in precisions}
        self._expected_logits: list[np.ndarray] = []

    def run_reference(self, reference: Reference) -> None:
        """Take the reference's rows through a block that has the checkpoint's own weights."""
        chunks = zip(self._expected, self._steps, strict=True)
        self._expected = [reference.run({HIDDEN: rows}, step) for rows, step in chunks]

    def run(self, precision: str, path: Path, shape: LayerShape) -> None:
        """Take a precision's rows through its file of that block."""
        graph = OnnxGraph(path, self.capacity, shape)
        self._found[precision] = [
            graph.run({HIDDEN: rows}, step) for rows, step in zip(self._found[precision], self._steps, strict=True)
        ]

    def run_final_norm(self, norm: Expected, path: Path) -> None:
        session = open_session(path)
        self._expected = [norm(rows) for rows in self._expected]
        for precision, chunks in self._found.items():
            self._found[precision] = [session.run([HIDDEN_OUT], {HIDDEN: rows})[0] for rows in chunks]

    def run_reference_head(self, logits_of: Expected) -> None:
        """Compute logits by a head that has the checkpoint's own weights."""
        self._expected_logits = [logits_of(rows[0]) for rows in self._expected]

    def report(self, head_path: Path) -> list[Quality]:
        """The quality of each precision, with the bundle's own head in all of them."""
        session = open_session(head_path)
        k = np.array([1], np.int64)
        loss = _mean_loss(self._expected_logits, self._tokens)
        qualities = []
        for precision, chunks in self._found.items():
            logits = [session.run([LOGITS], {HIDDEN: rows[0], TOP_K: k})[0] for rows in chunks]
            agreed = [
                found.argmax(-1) == expected.argmax(-1)
                for found, expected in zip(logits, self._expected_logits, strict=True)
            ]
            qualities.append(
                Quality(
                    precision=precision,
                    text=self.text,
                    num_tokens=len(self._tokens),
                    max_error=relative_error(chunks, self._expected),
                    greedy_agreement=float(np.concatenate(agreed).mean()),
                    perplexity=float(np.exp(_mean_loss(logits, self._tokens))),
                    reference_perplexity=float(np.exp(loss)),
                )
            )
        return qualities


def _mean_loss(logits: Sequence[np.ndarray], tokens: np.ndarray) -> float:
    """Mean negative log-probability of each token but the first, in nats."""
    losses: list[np.ndarray] = []
    starts = itertools.accumulate((len(chunk) for chunk in logits), initial=0)
    for start, chunk in zip(starts, logits, strict=False):
        following = tokens[start + 1 : start + 1 + len(chunk)]
        log_probs = log_softmax(chunk[: len(following)])
        losses.append(-np.take_along_axis(log_probs, following[:, None], axis=-1)[:, 0])
    return float(np.concatenate(losses).astype(np.float64).mean())
