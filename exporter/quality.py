"""Measures what a precision does to texts: its chain of blocks against float32 with the model's own weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exporter.config import LayerShape
from exporter.matrices import Matrix
from exporter.parity import OnnxGraph, open_session
from exporter.reference import Expected, Reference, relative_error
from exporter.steps import Step, text_steps
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.errors import CheckpointError
from flowspec_edge.manifest import HIDDEN, HIDDEN_OUT, LOGITS, TOP_K, Quality

MAX_TOKENS = 2048
"""Enough tokens to tell a loss of 1 % from none: as many rows run through every layer once per precision."""
WINDOW_TOKENS = 1024
"""The longest text that is measured at once."""
_HEAD_ROWS = 128
_HEAD_WEIGHTS = 2**22
"""Rows, and weights of the head, that are multiplied at once: a vocabulary's logits for a whole text are a GB."""


@dataclass(frozen=True)
class Evaluation:
    """What precisions are measured on: ``texts``, which users know as ``name``.

    One is refused whose perplexity is larger than float32's by a greater share than ``max_loss``.
    """

    name: str
    texts: Sequence[str]
    max_loss: float


def in_windows(
    tokenizer: Tokenizer, texts: Sequence[str], max_context: int, num_tokens: int = MAX_TOKENS
) -> list[list[int]]:
    """``num_tokens`` tokens of all texts together, in pieces that fit into the context and WINDOW_TOKENS."""
    size = min(WINDOW_TOKENS, max_context)
    found = [tokenizer.encode(text)[: num_tokens // len(texts)] for text in texts]
    return [tokens[start : start + size] for tokens in found for start in range(0, len(tokens), size)]


@dataclass(frozen=True)
class Scores:
    """What a model makes of texts.

    Attributes:
        losses: the negative log-probability of each token but the first of a text, in nats.
        likeliest: the likeliest next token at each position.
    """

    losses: np.ndarray
    likeliest: np.ndarray

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.losses.mean()))


class QualityCheck:
    """Takes the rows of texts through the layers, once in float32 and once with the files of each precision.

    ``texts`` are token ids, each text of which begins with an empty cache, and ``name`` is what users know them by.
    """

    def __init__(
        self, name: str, texts: Sequence[Sequence[int]], embedding: np.ndarray, precisions: Iterable[str]
    ) -> None:
        self.name = name
        self._steps: list[Step] = text_steps(texts)
        self.capacity = max(step.num_slots for step in self._steps) + 1
        self._next = np.concatenate([[*tokens[1:], -1] for tokens in texts])  # -1 behind the end of a text
        self._expected = [embedding[step.tokens].astype(np.float32)[None] for step in self._steps]
        self._found = {precision: list(self._expected) for precision in precisions}
        self._expected_scores: Scores | None = None

    @classmethod
    def of(
        cls,
        evaluation: Evaluation,
        tokenizer: Tokenizer,
        max_context: int,
        embedding: np.ndarray,
        precisions: Iterable[str],
    ) -> QualityCheck:
        """Raises CheckpointError where the texts tell nothing."""
        texts = in_windows(tokenizer, evaluation.texts, max_context)
        num_tokens = sum(map(len, texts))
        if num_tokens < 2:
            raise CheckpointError(
                f"--eval-text {evaluation.name}: has {num_tokens} tokens; give a text of a page or more"
            )
        return cls(evaluation.name, texts, embedding, precisions)

    def run_reference(self, reference: Reference) -> None:
        """Take the reference's rows through a block that has the model's own weights."""
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

    def run_reference_head(self, matrix: Matrix, finish: Expected) -> None:
        """Score the texts by a head that has the model's own weights. ``finish`` makes logits of its products."""
        rows = np.concatenate([chunk[0] for chunk in self._expected])
        self._expected_scores = _scores_by_parts(map(finish, _products_by_parts(matrix, rows)), self._next)

    def measure(self, precision: str, head_path: Path) -> Quality:
        """The quality of a precision with a head's file."""
        expected = self._expected_scores
        assert expected is not None
        rows = np.concatenate([chunk[0] for chunk in self._found[precision]])
        found = _scores_of_head(head_path, rows, self._next)
        return Quality(
            precision=precision,
            text=self.name,
            num_tokens=len(self._next),
            max_error=relative_error(self._found[precision], self._expected),
            greedy_agreement=float((found.likeliest == expected.likeliest).mean()),
            perplexity=found.perplexity,
            reference_perplexity=expected.perplexity,
        )


def _products_by_parts(matrix: Matrix, rows: np.ndarray) -> Iterator[np.ndarray]:
    """The products of some tokens after the other, [rows, tokens of the part], in float32."""
    num_tokens, num_in = matrix.shape
    step = max(_HEAD_WEIGHTS // num_in, 1)
    for start in range(0, num_tokens, step):
        yield rows @ matrix.unpacked(start, min(start + step, num_tokens)).T


def _scores_by_parts(parts: Iterable[np.ndarray], following: np.ndarray) -> Scores:
    """Scores from the logits of all rows for one part of the vocabulary after the other.

    ``following`` is each row's next token, int64 [rows], -1 where there is none.
    """
    num_rows = len(following)
    every = np.arange(num_rows)
    largest, likeliest = np.full(num_rows, -np.inf), np.zeros(num_rows, np.int64)
    total, wanted = np.zeros(num_rows), np.zeros(num_rows)
    start = 0
    for logits in parts:
        best = logits.argmax(axis=1)
        highest = np.maximum(largest, logits[every, best])
        likeliest = np.where(highest > largest, start + best, likeliest)
        total = total * np.exp(largest - highest) + np.exp(logits - highest[:, None]).sum(axis=1)
        here = (following >= start) & (following < start + logits.shape[1])
        wanted[here] = logits[here, following[here] - start]
        largest, start = highest, start + logits.shape[1]
    return Scores((largest + np.log(total) - wanted)[following >= 0], likeliest)


def _scores_of_head(path: Path, rows: np.ndarray, following: np.ndarray) -> Scores:
    session, k = open_session(path), np.array([1], np.int64)
    found = []
    for start in range(0, len(rows), _HEAD_ROWS):
        few = slice(start, start + _HEAD_ROWS)
        logits = session.run([LOGITS], {HIDDEN: rows[few], TOP_K: k})[0]
        found.append(_scores_by_parts([logits], following[few]))
    return Scores(*(np.concatenate(parts) for parts in zip(*((s.losses, s.likeliest) for s in found), strict=True)))
