"""Which tokens a draft head drafts, where these are not all."""

from __future__ import annotations

import numpy as np

from exporter.tensors import TensorFiles
from flowspec_edge.errors import CheckpointError
from flowspec_edge.manifest import Geometry

D2T = "d2t"


def read_target_tokens(tensors: TensorFiles, num_tokens: int, target: Geometry) -> np.ndarray:
    """The target's id of each draft token, int64 [num_tokens].

    The tensor ``d2t`` has, for each draft token, the difference between the target's id and the draft's own; ``t2d``
    says of each id of the target whether it is drafted.

    Raises:
        CheckpointError: they contradict the target or each other.
    """
    tokens: np.ndarray = np.arange(num_tokens)
    if num_tokens == target.vocab_size and D2T not in tensors:
        return tokens
    tokens = tokens + tensors.read_integers(D2T, (num_tokens,))
    first, last = int(tokens.min()), int(tokens.max())
    if first < 0 or last >= target.vocab_size or len(np.unique(tokens)) != num_tokens:
        raise CheckpointError(
            f"{tensors.directory}: d2t leads to tokens {first} to {last}, or to one twice; the target has "
            f"{target.vocab_size}; use the head trained for this target"
        )
    if "t2d" in tensors:
        drafted = tensors.read_integers("t2d", (target.vocab_size,))
        if not np.array_equal(np.flatnonzero(drafted), np.sort(tokens)):
            raise CheckpointError(f"{tensors.directory}: t2d and d2t name different tokens; download the head again")
    return tokens
