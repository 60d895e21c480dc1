"""Writes a bundle's table of embeddings, which is read row by row from its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from exporter.onnx_file import as_bytes
from exporter.source import Source


def write_embedding(source: Source, path: Path) -> np.ndarray:
    """Write the embedding piece by piece, as float16 where that loses nothing, else as float32.

    Returns:
        The table, mapped from the file.
    """
    with np.errstate(over="ignore"):
        is_exact = all(np.array_equal(rows.astype(np.float16), rows) for rows in source.embedding())
    geometry = source.geometry
    dtype = np.dtype(np.float16 if is_exact else np.float32)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
    with path.open("wb") as file:
        shape = geometry.vocab_size, geometry.hidden_size
        np.lib.format.write_array_header_1_0(file, {**header, "shape": shape})
        for rows in source.embedding():
            file.write(as_bytes(rows.astype(dtype, copy=False)))
    table: np.ndarray = np.load(path, mmap_mode="r")
    return table
