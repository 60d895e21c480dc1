"""The files of a run: written aside and then renamed, and of one set of options."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flowspec_edge.errors import TrainingError


def check_same_run(directory: Path, wanted: dict[str, Any]) -> None:
    """Note what a run in ``directory`` is of, or compare it with what was noted.

    Raises:
        TrainingError: the directory holds a run of other settings.
    """
    path = directory / "run.json"
    if not path.exists():
        path.write_text(json.dumps(wanted, indent=1))
        return
    found = json.loads(path.read_text())
    for key, value in wanted.items():
        if found.get(key) != value:
            raise TrainingError(
                f"{directory}: holds a run with {key} = {found.get(key)}, not {value}; "
                "give the same options to go on with it, or another --run directory"
            )


def write_array(path: Path, array: np.ndarray) -> None:
    """Write so that ``path`` exists only when it is whole."""
    with _renamed_at_the_end(path) as file:
        np.save(file, array)


def write_json(path: Path, value: Any) -> None:
    """Write so that ``path`` exists only when it is whole."""
    with _renamed_at_the_end(path) as file:
        file.write(json.dumps(value).encode())


@contextmanager
def _renamed_at_the_end(path: Path) -> Iterator[BinaryIO]:
    aside = path.with_suffix(".part")
    try:
        with aside.open("wb") as file:
            yield file
        os.replace(aside, path)
    except OSError as cause:
        raise TrainingError(f"{path}: cannot be written: {cause}") from cause
