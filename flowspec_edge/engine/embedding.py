"""The embedding table of a bundle: read from its file row by row, so that only rows in use take memory.

The file is not mapped. Where a mapped file is cut off, the system ends the process (SIGBUS), and where one is written
over, rows become other ones without a word.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flowspec_edge.core.rows import Floats
from flowspec_edge.errors import BundleError


class Embedding:
    """The table in a file of NumPy's format: ``shape`` is [vocab_size, hidden_size].

    It may be used from several threads, and is closed when nobody has it any more. Where another file takes the place
    of this one, it is read on as it was.

    Raises:
        BundleError: the file cannot be read, or holds no such table.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._file)
            self.shape, self._dtype, self._first_byte = _read_header(self._file)
            self._state = self._current_state()
        except (OSError, ValueError) as cause:
            raise BundleError(
                f"{path}: no embedding table can be read here ({cause}); copy the bundle again"
            ) from cause
        self._row_bytes = self.shape[1] * self._dtype.itemsize
        if os.fstat(self._file).st_size < self._first_byte + self.shape[0] * self._row_bytes:
            raise BundleError(f"{path}: the embedding table ends before its last row; copy the bundle again")

    def rows(self, tokens: Sequence[int]) -> Floats:
        """The rows of these tokens, [tokens, hidden_size].

        Raises:
            BundleError: the file has changed since it was opened, or cannot be read any more.
        """
        found = np.empty((len(tokens), self.shape[1]), self._dtype)
        try:
            sizes = {
                os.preadv(self._file, [row], self._first_byte + token * self._row_bytes)
                for row, token in zip(found, tokens, strict=True)
            }
            is_as_before = self._current_state() == self._state and sizes <= {self._row_bytes}
        except OSError as cause:
            raise BundleError(f"{self._path}: not readable any more ({cause.strerror or cause})") from cause
        if not is_as_before:
            raise BundleError(
                f"{self._path}: the file has changed while it was in use; copy or export the bundle again, and while "
                "nodes run into another directory"
            )
        return found.astype(np.float32)

    def _current_state(self) -> tuple[int, int, int]:
        """What changes when someone writes to the file. That it gets or loses a name, or is read, is not of it."""
        status = os.fstat(self._file)
        return status.st_ino, status.st_size, status.st_mtime_ns


def _read_header(file: int) -> tuple[tuple[int, ...], np.dtype[np.floating], int]:
    """Shape and type of a table, and where its first row begins. Raises ValueError where there is none."""
    with open(os.dup(file), "rb") as header:
        version = np.lib.format.read_magic(header)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"format version {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_transposed, dtype = read(header)
        if len(shape) != 2 or is_transposed or dtype.kind != "f":
            raise ValueError(f"an array of {dtype} and shape {shape}")
        return shape, dtype, header.tell()
