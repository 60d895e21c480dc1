"""Bundles made of the GGUF files that users name: once for each file, by the exporter in a process of its own.

The exporter is no part of what boards run, and what it imports and takes of memory is gone when the bundle is there.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from flowspec_edge.cli.show_progress import Progress
from flowspec_edge.errors import BundleError, system_words
from flowspec_edge.files import conversions_directory
from flowspec_edge.manifest import FORMAT_VERSION, MANIFEST_NAME
from flowspec_edge.version import __version__
from flowspec_edge.weights.file_locks import EXCLUSIVE, lock_file

MAGIC = b"GGUF"
HEAD_BYTES = 2**20
"""Of each part, the beginning that a file is known by: what it is made of, and with small models some weights."""
_PART = re.compile(r"(?P<stem>.*)-\d{5}(?P<count>-of-\d{5}\.gguf)")
_LAYERS = re.compile(r"layers \[\d+, (?P<stop>\d+)\) of (?P<all>\d+)")


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def bundle_of(path: Path) -> Path:
    """The directory of the bundle that a GGUF file became, now or earlier.

    Other processes that ask for the same wait for the one that asked first. Who is ended meanwhile leaves nothing that
    another one would take for a bundle. One that another exporter made of it is not taken.

    Raises:
        BundleError: the file cannot become one, or the cache cannot be written.
    """
    if not is_gguf(path) and path.suffix != ".gguf":
        raise BundleError(f"{path}: is a file, but no GGUF file; give one, or the directory of a bundle")
    try:
        of_file = f"{path.name.removesuffix('.gguf')}-{_file_digest(path)}"
        name = f"{of_file}-{_exporter_digest()}"
        home = conversions_directory()
        home.mkdir(parents=True, exist_ok=True)
        directory = home / name
        descriptor = os.open(home / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as cause:
        raise BundleError(f"{path}: its bundle cannot be kept ({system_words(cause)})") from cause
    try:
        if not lock_file(descriptor, EXCLUSIVE):
            print(f"{path.name}: another process makes its bundle, waiting for it", file=sys.stderr)
            lock_file(descriptor, EXCLUSIVE, waits=True)
        if not (directory / MANIFEST_NAME).is_file():
            _convert(path, directory, descriptor)
            for older in sorted(home.glob(f"{glob.escape(of_file)}-*/{MANIFEST_NAME}")):
                if older.parent != directory:
                    print(
                        f"{path.name}: {older.parent} is the bundle that an earlier exporter made of it; remove it "
                        "where no node serves it any more",
                        file=sys.stderr,
                    )
    finally:
        os.close(descriptor)
    return directory


def _convert(path: Path, directory: Path, lock: int) -> None:
    """Have the exporter write the bundle, which appears at ``directory`` when it is whole.

    The exporter holds the lock as well, so that nobody begins anew beside it where this process is killed.
    """
    for left_over in directory.parent.glob(f".{directory.name}.*"):  # of an exporter that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    command = [sys.executable, "-P", "-m", "exporter", str(path), "--out", str(directory), "--json"]
    command += ["--name", path.name.removesuffix(".gguf")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", pass_fds=(lock,)
    ) as exporter:
        assert exporter.stderr is not None and exporter.stdout is not None
        last = _follow(path, exporter.stderr)
        answer = exporter.stdout.read()
    if exporter.returncode:
        raise BundleError(_problem(answer) or f"{path}: no bundle could be made of it ({last})")


def _follow(path: Path, lines: Iterator[str]) -> str:
    """Show how far the exporter is, pass on its notes, and return its last line."""
    progress, last, num_done = None, "", 0
    for line in lines:
        last = line.strip()
        if last.startswith("note: "):
            print(f"{path.name}: {last}", file=sys.stderr)
        if (found := _LAYERS.match(last)) is not None:
            progress = progress or Progress(f"making a bundle of {path.name}, once", int(found["all"]), "layers")
            for _ in range(num_done, int(found["stop"])):
                progress.step()
            num_done = int(found["stop"])
    if progress is not None:
        progress.close()
    return last


def _problem(answer: str) -> str | None:
    """What the exporter says in JSON of why it failed."""
    try:
        message = json.loads(answer)["error"]["message"]
    except (ValueError, TypeError, KeyError):
        return None
    return message if isinstance(message, str) else None


def _file_digest(path: Path) -> str:
    """Digits that differ where the file does: sizes, times and beginnings of its parts."""
    found = hashlib.sha256()
    for part in _parts(path.resolve()):
        status = part.stat()
        found.update(f"{part.name} {status.st_size} {status.st_mtime_ns} ".encode())
        with part.open("rb") as file:
            found.update(file.read(HEAD_BYTES))
    return found.hexdigest()[:16]


def _exporter_digest() -> str:
    """Digits that differ where what is made of a file may: versions, and all that the exporter consists of, the draft
    heads that come along included.

    Which of its files a bundle depends on is not told apart, so that nobody has to remember it.
    """
    found = hashlib.sha256(f"{__version__} {FORMAT_VERSION}".encode())
    spec = importlib.util.find_spec("exporter")  # which does not import it
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        sources = (path for path in Path(folder).rglob("*") if path.suffix in (".py", ".txt"))
        heads = (path for path in Path(folder, "heads").glob("*/*") if path.suffix in (".json", ".safetensors"))
        for source in sorted((*sources, *heads)):
            found.update(source.read_bytes())
    return found.hexdigest()[:8]


def _parts(path: Path) -> list[Path]:
    """The file, and its other parts where it is one of several."""
    name = _PART.fullmatch(path.name)
    if name is None:
        return [path]
    return sorted(path.parent.glob(f"{glob.escape(name['stem'])}-[0-9][0-9][0-9][0-9][0-9]{name['count']}"))
