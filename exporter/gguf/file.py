"""Reads the header of a GGUF file, in one part or in several, and its tensors one by one.

The format is described in ggml's docs/gguf.md. The reader of the gguf package makes two arrays for each string: for a
vocabulary of 49,000 tokens 2.1 s and 160 MB, and it takes what a damaged file says for granted. So the header is read
here, and every length is compared with the file's before it is used.
"""

from __future__ import annotations

import math
import os
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from flowspec_edge.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
"""Tensors begin at multiples of this many bytes where the file does not give another number."""
MAX_ALIGNMENT = 1 << 20
MAX_DIMENSIONS = 4
SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
"""Value types of the header by their number."""
STRING, ARRAY = 8, 9
_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a file. ``shape`` is outermost first, as numpy has it, and ``type`` is ggml's name, as ``Q4_K``."""

    name: str
    shape: tuple[int, ...]
    type: str
    path: Path
    offset: int
    num_bytes: int

    @property
    def num_rows(self) -> int:
        return math.prod(self.shape[:-1])

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The stored bytes of the rows ``[start, stop)``: uint8 [rows, bytes of a row].

        Raises:
            CheckpointError: the file has become shorter, or cannot be read.
        """
        row_bytes = self.num_bytes // self.num_rows
        num_rows = (self.num_rows if stop is None else stop) - start
        try:
            found = np.fromfile(self.path, np.uint8, num_rows * row_bytes, offset=self.offset + start * row_bytes)
        except OSError as cause:
            raise CheckpointError(f"{self.path}: tensor {self.name} is not readable ({cause.strerror})") from cause
        if len(found) != num_rows * row_bytes:
            raise CheckpointError(
                f"{self.path}: the file has become shorter and ends within tensor {self.name}; download it again"
            )
        return found.reshape(num_rows, row_bytes)


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file with all its parts. Values are plain: numbers, strings, and lists of these."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Read the header of the file, and those of its other parts where it is one of several.

        Raises:
            CheckpointError: it is no GGUF file, is damaged, of another version or byte order, or a part is missing.
        """
        first = _read_header(path)
        num_parts = first.metadata.get("split.count", 1)
        if num_parts == 1:
            return first
        tensors: dict[str, GgufTensor] = {}
        metadata: dict[str, Any] = {}
        for number, part_path in enumerate(_part_paths(path, num_parts)):
            part = first if part_path == path else _read_header(part_path)
            if (part.metadata.get("split.no"), part.metadata.get("split.count")) != (number, num_parts):
                raise CheckpointError(
                    f"{part_path}: says that it is part {part.metadata.get('split.no')} of "
                    f"{part.metadata.get('split.count')}, expected part {number} of {num_parts}; download it again"
                )
            if twice := sorted(tensors.keys() & part.tensors.keys()):
                raise CheckpointError(f"{part_path}: tensor {twice[0]} is in another part too")
            tensors |= part.tensors
            metadata = part.metadata | metadata  # the first part has the model's, the others little more than split.*
        expected = metadata.get("split.tensors.count", len(tensors))
        if len(tensors) != expected:
            raise CheckpointError(
                f"{path}: its {num_parts} parts have {len(tensors)} tensors, expected {expected}; download them again"
            )
        return cls(path, metadata, tensors)


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF file does, or is named like one."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC or path.suffix == ".gguf"
    except OSError:
        return False


def _part_paths(path: Path, num_parts: Any) -> list[Path]:
    """All parts' paths in order, of which ``path`` is one. Raises CheckpointError where one is missing."""
    name = _PART.fullmatch(path.name)
    if name is None or int(name["count"]) != num_parts:
        raise CheckpointError(
            f"{path}: is one of {num_parts} parts, which must keep names as model-00001-of-{num_parts:05}.gguf"
        )
    paths = [path.with_name(f"{name['stem']}-{number:05}-of-{num_parts:05}.gguf") for number in range(1, num_parts + 1)]
    for part in paths:
        if not part.is_file():
            raise CheckpointError(f"{path}: is one of {num_parts} parts, and {part.name} is missing beside it")
    return paths


@dataclass
class _Header:
    """Takes values from the beginning of a file. What goes beyond its end is refused."""

    path: Path
    file: BinaryIO
    num_bytes: int
    at: int = field(default=0)

    def take(self, num_bytes: int, what: str) -> bytes:
        if num_bytes > self.num_bytes - self.at:
            raise CheckpointError(
                f"{self.path}: {what} needs {num_bytes} bytes at {self.at}, but the file ends after {self.num_bytes}; "
                "download it again"
            )
        self.at += num_bytes
        return self.file.read(num_bytes)

    def number(self, what: str, form: str = "<I") -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form), what))[0])

    def string(self, what: str) -> str:
        raw = self.take(self.number(what, "<Q"), what)
        try:
            return raw.decode()
        except UnicodeDecodeError as cause:
            raise CheckpointError(f"{self.path}: {what} is not UTF-8 ({cause.reason} at {cause.start})") from cause

    def value(self, kind: int, what: str) -> Any:
        if kind == STRING:
            return self.string(what)
        if kind == ARRAY:
            return self._array(what)
        return self._scalars(kind, 1, what)[0]

    def _array(self, what: str) -> list[Any]:
        kind, length = self.number(what), self.number(what, "<Q")
        if kind == ARRAY:
            raise CheckpointError(f"{self.path}: {what} is a list of lists, which no model that is supported has")
        if kind == STRING:
            return [self.string(what) for _ in range(length)]
        return self._scalars(kind, length, what)

    def _scalars(self, kind: int, length: int, what: str) -> list[Any]:
        dtype = SCALARS.get(kind)
        if dtype is None:
            raise CheckpointError(f"{self.path}: {what} is of type {kind}, which GGUF does not have; download it again")
        values: list[Any] = np.frombuffer(self.take(length * dtype.itemsize, what), dtype).tolist()
        return values


def _read_header(path: Path) -> GgufFile:
    try:
        with path.open("rb") as file:
            header = _Header(path, file, os.fstat(file.fileno()).st_size)
            num_tensors, num_values = _read_counts(header)
            metadata: dict[str, Any] = {}
            for _ in range(num_values):
                key = header.string("the name of a value")
                if key in metadata:
                    raise CheckpointError(f"{path}: {key} is there twice")
                metadata[key] = header.value(header.number(key), key)
            infos = [_read_tensor_info(header) for _ in range(num_tensors)]
    except OSError as cause:
        raise CheckpointError(f"{path}: not readable ({cause.strerror})") from cause
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: general.alignment is {alignment!r}, expected a power of two")
    start = -(-header.at // alignment) * alignment
    return GgufFile(path, metadata, _place_tensors(path, infos, start, header.num_bytes))


def _read_counts(header: _Header) -> tuple[int, int]:
    """How many tensors and how many values the header has."""
    magic = header.take(min(len(MAGIC), header.num_bytes), "the file's kind")
    if magic != MAGIC:
        raise CheckpointError(f"{header.path}: is no GGUF file; it begins with {magic!r}, expected {MAGIC!r}")
    version = header.number("the version")
    if version and version & 0xFFFF == 0:
        raise CheckpointError(f"{header.path}: is big-endian; only little-endian GGUF files are read")
    if version not in VERSIONS:
        raise CheckpointError(
            f"{header.path}: GGUF version {version} is not supported, expected 2 or 3; convert the model again"
        )
    return header.number("the number of tensors", "<Q"), header.number("the number of values", "<Q")


def _read_tensor_info(header: _Header) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape outermost first, type's number, and offset behind the header, of the next tensor."""
    name = header.string("the name of a tensor")
    num_dimensions = header.number(f"tensor {name}")
    if num_dimensions > MAX_DIMENSIONS:
        raise CheckpointError(f"{header.path}: tensor {name} has {num_dimensions} dimensions, expected at most 4")
    innermost_first = struct.unpack(f"<{num_dimensions}Q", header.take(8 * num_dimensions, f"tensor {name}"))
    kind = header.number(f"tensor {name}")
    return name, innermost_first[::-1], kind, header.number(f"tensor {name}", "<Q")


def _place_tensors(
    path: Path, infos: list[tuple[str, tuple[int, ...], int, int]], start: int, file_bytes: int
) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in infos:
        if name in tensors:
            raise CheckpointError(f"{path}: tensor {name} is there twice")
        try:
            quantization = GGMLQuantizationType(kind)
        except ValueError:
            raise CheckpointError(
                f"{path}: tensor {name} is of type {kind}, which this version does not know"
            ) from None
        block_size, block_bytes = GGML_QUANT_SIZES[quantization]
        if not shape or 0 in shape or shape[-1] % block_size:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {list(shape)}, expected rows of whole {quantization.name} blocks of "
                f"{block_size}"
            )
        num_bytes = math.prod(shape) // block_size * block_bytes
        if start + offset + num_bytes > file_bytes:
            raise CheckpointError(
                f"{path}: tensor {name} ends at byte {start + offset + num_bytes}, but the file has {file_bytes}; "
                "download it again"
            )
        tensors[name] = GgufTensor(name, shape, quantization.name, path, start + offset, num_bytes)
    return tensors
