"""Locks on files that other processes may rename or remove meanwhile (flock).

A lock ends with the process that holds it. It belongs to the opened file, not to its name; so a process that has locked
a file looks whether the name still stands for that file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

SHARED = fcntl.LOCK_SH
"""Any number of readers hold it at once."""
EXCLUSIVE = fcntl.LOCK_EX
"""One holder, and no reader beside it."""


def lock_file(descriptor: int, kind: int, *, waits: bool = False) -> bool:
    """Lock an opened file, or change the lock that is held; False where another one holds it and nobody ``waits``."""
    try:
        fcntl.flock(descriptor, kind if waits else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def locked(path: Path, kind: int, *, waits: bool = False) -> Iterator[bool]:
    """Gives whether the file exists and was locked; if so, the lock is held until the block ends."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield False
        return
    try:
        yield lock_file(descriptor, kind, waits=waits) and is_same_file(descriptor, path)
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether a file cannot be locked exclusively now; a file that does not exist counts as locked."""
    with locked(path, EXCLUSIVE) as is_free:
        return not is_free


def is_same_file(descriptor: int, path: Path) -> bool:
    """Whether the name still stands for the opened file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
