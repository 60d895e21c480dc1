"""The target's output head. It gives logits for verification, and the likeliest tokens for drafting."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flowspec_edge.core.rows import Floats
from flowspec_edge.engine.graphs import load_graph, pad_rows
from flowspec_edge.engine.integer_products import EXACT_PRECISION, check_integer_products
from flowspec_edge.engine.padding import ROW_MULTIPLES, padded
from flowspec_edge.engine.row_check import CUTS
from flowspec_edge.manifest import HIDDEN, LOGITS, TOP_K, TOP_LOG_PROBS, TOP_TOKENS, Manifest

_log = logging.getLogger(__name__)


class Head:
    """Maps normed hidden rows to logits, or to the likeliest tokens.

    The graph itself picks the likeliest tokens, so that rows as wide as the vocabulary do not leave it.
    """

    def __init__(self, directory: Path, manifest: Manifest, *, num_threads: int = 1) -> None:
        if manifest.precision == EXACT_PRECISION:
            check_integer_products()
        self._session = load_graph(directory / manifest.head.file, num_threads)
        self._is_row_by_row = True
        rows = np.random.default_rng(0).standard_normal((CUTS[-1], manifest.geometry.hidden_size), np.float32)
        for self._row_multiple in ROW_MULTIPLES:
            apart = [self._run(rows[first:stop]) for first, stop in itertools.pairwise(CUTS)]
            if np.array_equal(np.concatenate(apart), self._run(rows)):
                self._is_row_by_row = False
                return
        _log.warning("the bits of a row's logits depend on its chunk on this device, so rows run one by one")

    def logits(self, hidden: Floats) -> Floats:
        """The logits, [rows, vocab_size], of normed rows, [rows, hidden_size]."""
        if self._is_row_by_row and len(hidden) > 1:
            return np.concatenate([self._run(row[None]) for row in hidden])
        return self._run(hidden)

    def top(self, hidden: Floats, k: int) -> tuple[NDArray[np.int64], Floats]:
        """The ``k`` likeliest next tokens and their log-probabilities, both [rows, k], likeliest first."""
        tokens, log_probs = self._session.run([TOP_TOKENS, TOP_LOG_PROBS], self._inputs(hidden, k))
        return tokens[: len(hidden)], log_probs[: len(hidden)]

    def _run(self, hidden: Floats) -> Floats:
        (logits,) = self._session.run([LOGITS], self._inputs(hidden, 1))
        return logits[: len(hidden)]  # type: ignore[no-any-return]

    def _inputs(self, hidden: Floats, k: int) -> dict[str, NDArray[np.generic]]:
        num_rows = padded(len(hidden), self._row_multiple)
        return {HIDDEN: pad_rows(hidden, num_rows)[0], TOP_K: np.array([k], np.int64)}
