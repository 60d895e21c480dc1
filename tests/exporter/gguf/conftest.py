from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

Rows = dict[str, tuple[str, np.ndarray]]


def write_gguf(path: Path, values: dict[str, Any], tensors: Rows, architecture: str = "llama") -> Path:
    """Write a GGUF file with values and tensors, each given by its type and stored rows."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)
    for key, (kind, rows) in tensors.items():
        writer.add_tensor(key, rows, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes such a file, and returns its path."""

    def write(values: dict[str, Any], tensors: Rows, name: str = "model.gguf", architecture: str = "llama") -> Path:
        return write_gguf(tmp_path / name, values, tensors, architecture)

    return write


def stored_rows(kind: str, num_rows: int, num_in: int, seed: int = 0) -> np.ndarray:
    """Random stored bytes of a matrix, in which every float16 scale is finite: uint8 [num_rows, bytes of a row]."""
    block_size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (num_rows, num_in // block_size, block_bytes), np.uint8)
    scales = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(kind, (0,))
    for start in scales if block_size > 1 else ():
        halves = rng.normal(0, 0.1, blocks.shape[:2]).astype("<f2")
        blocks[..., start : start + 2] = halves[..., None].view(np.uint8)
    if block_size == 1:
        values = rng.normal(0, 1, (num_rows, num_in)).astype(np.float32)
        if kind == "BF16":
            return (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
        return values.astype({"F32": "<f4", "F16": "<f2"}[kind]).view(np.uint8)
    return blocks.reshape(num_rows, -1)
