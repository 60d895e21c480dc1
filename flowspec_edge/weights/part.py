"""A file that is being fetched: its bytes so far, in a file of its own beside the finished ones."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from pathlib import Path

from flowspec_edge.errors import CacheError
from flowspec_edge.weights.file_locks import EXCLUSIVE, SHARED, is_same_file, lock_file

PART_SUFFIX = ".part"
READ_BYTES = 2**20


def open_part(path: Path, sha256: str) -> Part | None:
    """Open or make the part of a file, ``path`` with :data:`PART_SUFFIX`; None while another process fetches that file.

    Raises:
        OSError: nothing can be written there.
    """
    path = path.with_name(path.name + PART_SUFFIX)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if not lock_file(descriptor, EXCLUSIVE):
            os.close(descriptor)
            return None
        if is_same_file(descriptor, path):
            return Part(path, sha256, descriptor)
        os.close(descriptor)  # another process finished the file after it was opened here and before it was locked


class Part:
    """The part of one file, which this process alone may write. Not safe for use from several threads at once."""

    def __init__(self, path: Path, sha256: str, descriptor: int) -> None:
        self._path, self._sha256 = path, sha256
        self._file = os.fdopen(descriptor, "r+b", buffering=0)
        self._sum = hashlib.sha256()
        while data := self._file.read(READ_BYTES):
            self._sum.update(data)
        self.num_bytes = self._file.tell()
        """How many bytes are here."""

    def write(self, data: bytes) -> None:
        """Append.

        Raises:
            CacheError: the disk is full or broken. What was written before stays, to go on with.
        """
        try:
            view = memoryview(data)
            while view:
                num_written = self._file.write(view)
                self._sum.update(view[:num_written])
                self.num_bytes += num_written
                view = view[num_written:]
        except OSError as cause:
            raise self._refused(cause) from cause

    def drop(self) -> None:
        """Forget all bytes.

        Raises:
            CacheError: the disk is broken, or can only be read.
        """
        try:
            self._file.seek(0)
            self._file.truncate()
        except OSError as cause:
            raise self._refused(cause) from cause
        self._sum = hashlib.sha256()
        self.num_bytes = 0

    def finish(self) -> str:
        """The sha256 of the bytes; where it is the right one, the part becomes the file.

        Raises:
            CacheError: the disk is full or broken.
        """
        found = self._sum.hexdigest()
        if found != self._sha256:
            return found
        try:
            os.fsync(self._file.fileno())  # before the rename: else a power cut may leave the right name on wrong bytes
            self._path.rename(self._path.with_suffix(""))
            lock_file(self._file.fileno(), SHARED, waits=True)  # a lease may now begin, an eviction may not
            directory = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as cause:
            raise CacheError(
                f"weight cache {self._path.parent.parent}: {cause.strerror}; see whether the disk is well"
            ) from cause
        return found

    def close(self) -> None:
        """Let other processes have it. A part without bytes leaves no file, where the disk lets it be removed."""
        with contextlib.suppress(OSError):
            if not self.num_bytes and is_same_file(self._file.fileno(), self._path):
                self._path.unlink()
        self._file.close()

    def _refused(self, cause: OSError) -> CacheError:
        what = "the disk is full" if cause.errno in (errno.ENOSPC, errno.EDQUOT) else cause.strerror
        return CacheError(
            f"weight cache {self._path.parent.parent}: {what} ({self.num_bytes} bytes of {self._sha256[:12]} are "
            "written); free space there (flowspec cache prune), or choose another place with --cache DIR"
        )
