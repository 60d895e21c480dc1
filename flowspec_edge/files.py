"""What a node keeps between runs: small files that only their owner may read."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import secrets
import stat
import time
from collections.abc import Callable
from pathlib import Path

from flowspec_edge.errors import StateError, system_words

STATE_VARIABLE = "FLOWSPEC_HOME"
RECORD_VARIABLE, RECORD_TEXT_VARIABLE = "FLOWSPEC_RECORD", "FLOWSPEC_RECORD_TEXT"
MAX_STATE_BYTES = 2**24
"""Far more than any of these files has."""
_PRIVATE = 0o600
_log = logging.getLogger(__name__)


def state_directory() -> Path:
    """``$FLOWSPEC_HOME``, or ``flowspec`` where the user's configuration lives (XDG Base Directory Specification)."""
    if chosen := os.environ.get(STATE_VARIABLE):
        return Path(chosen)
    if configuration := os.environ.get("XDG_CONFIG_HOME"):
        return Path(configuration) / "flowspec"
    try:
        return Path.home() / ".config" / "flowspec"
    except RuntimeError as cause:
        raise StateError(
            f"this user has no home directory to keep the cluster key in; set {STATE_VARIABLE} to a directory"
        ) from cause


def cache_directory() -> Path:
    """Where large files are kept that can be fetched again: ``$FLOWSPEC_HOME``, or beside the user's other caches."""
    if chosen := os.environ.get(STATE_VARIABLE):
        return Path(chosen) / "weights"
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "flowspec" / "weights"
    try:
        return Path.home() / ".cache" / "flowspec" / "weights"
    except RuntimeError as cause:
        raise StateError(
            f"this user has no home directory to keep weights in; set {STATE_VARIABLE} to a directory, or choose "
            "--cache DIR"
        ) from cause


def conversions_directory() -> Path:
    """Where bundles are kept that were made of other files. Raises StateError as :func:`cache_directory` does."""
    return cache_directory().with_name("converted")


def read_private(path: Path) -> str | None:
    """The text of a file, or None where there is none.

    Raises:
        StateError: it cannot be read, is no file of its own, or others may read it.
    """
    try:
        with open(path, encoding="utf-8", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise StateError(f"{path} is no file; remove it")
            if status.st_mode & 0o077:
                raise StateError(
                    f"{path} can be read by others (mode {status.st_mode & 0o777:04o}); mend it with: chmod 600 {path}"
                )
            if status.st_size > MAX_STATE_BYTES:
                raise StateError(f"{path} has {status.st_size} bytes, more than anything that is kept there; remove it")
            return file.read()
    except FileNotFoundError as cause:
        if path.is_symlink():
            raise StateError(
                f"{path} leads to {os.readlink(path)}, which does not exist; bring that back, or remove the link: "
                f"rm {path}"
            ) from cause
        return None
    except (OSError, UnicodeDecodeError) as cause:
        raise StateError(f"{path} cannot be read ({system_words(cause)}); mend or remove it") from cause


def write_private(path: Path, text: str, *, is_new: bool = False) -> bool:
    """Write a file of mode 0600, whole or not at all. With ``is_new`` a file that exists already stays as it is.

    Returns:
        Whether it was written.

    Raises:
        StateError: it cannot be written: no permission, no space.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _PRIVATE)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            if not is_new:
                draft.replace(path)
                return True
            try:
                os.link(draft, path)  # of two processes that start at once, one wins
            except FileExistsError:
                return False
            return True
        finally:
            with contextlib.suppress(FileNotFoundError):
                draft.unlink()
    except OSError as cause:
        raise StateError(
            f"{path} cannot be written ({cause.strerror or cause}); free the space or mend the permission, "
            f"or set {STATE_VARIABLE} to a directory of your own"
        ) from cause


def _open_at_once(path: str, flags: int) -> int:
    """Without waiting for a writer, as a pipe in the place of a file would have it."""
    return os.open(path, flags | os.O_NONBLOCK)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, _PRIVATE)


def records_text() -> bool:
    """Whether the user lets journals have what was asked and written."""
    return os.environ.get(RECORD_TEXT_VARIABLE, "") not in ("", "0")


def open_record(kind: str) -> Callable[[bytes], None] | None:
    """A new file for the journal of one core, in the directory named by ``FLOWSPEC_RECORD``; None where it is not set.

    What is written is in the file at once, so that a process that is killed leaves it whole.

    Raises:
        StateError: the file cannot be made.
    """
    directory = os.environ.get(RECORD_VARIABLE)
    if not directory:
        return None
    path = Path(directory) / f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{secrets.token_hex(3)}.journal"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = io.FileIO(path, "xb", opener=_open_private)  # closed when `write` is forgotten
    except OSError as cause:
        raise StateError(
            f"{path} cannot be written ({cause.strerror or cause}); give {RECORD_VARIABLE} another directory, or unset "
            "it"
        ) from cause

    def write(data: bytes) -> None:
        if file.closed:
            return
        try:
            if file.write(data) == len(data):
                return
            why = "no space is left"
        except OSError as cause:
            why = cause.strerror or str(cause)
        file.close()  # a full disk ends the journal, not the ring; behind a part of an entry nothing could be read
        _log.warning("%s is not written any further (%s)", path, why)

    return write
