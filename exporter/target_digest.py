"""Tells the target that a draft head was trained for from other models."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from exporter.source import Source
from flowspec_edge.errors import CheckpointError

FIELD = "target"
"""Of a head's ``config.json``: name and digest of its target."""


def target_digest(source: Source) -> str:
    """Hex sha256 of a model's sizes and of its final norm.

    Every file format keeps norms as they are, so all quantisations of a model have one digest, and a model that was
    trained further has another.
    """
    geometry = source.geometry
    names = "num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size"
    sizes = [getattr(geometry, name) for name in names]
    norm = np.ascontiguousarray(source.final_norm(), "<f4")
    return hashlib.sha256(np.array(sizes, "<i8").tobytes() + norm.tobytes()).hexdigest()


def target_field(source: Source, name: str) -> dict[str, Any]:
    """What a head for this target has in its config."""
    return {FIELD: {"name": name, "digest": target_digest(source)}}


def refuse_other_target(path: Path, config: Mapping[str, Any], source: Source) -> None:
    """Raise CheckpointError where the config of a head, at ``path``, names another target. Many name none."""
    named = config.get(FIELD)
    if not isinstance(named, dict) or "digest" not in named:
        return
    found = target_digest(source)
    if named["digest"] != found:
        raise CheckpointError(
            f"{path}: this head was trained for {named.get('name')!s:.80} (digest {named['digest']!s:.12}), not for "
            f"{source.path.name} (digest {found:.12}); train one for it: flowspec-train-head {source.path} --out HEAD"
        )
