from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from exporter.gguf.file import GgufFile, is_gguf
from flowspec_edge.errors import CheckpointError
from tests.exporter.gguf.conftest import stored_rows

Write = Callable[..., Path]
ROWS = stored_rows("Q4_K", 3, 512)


def floats(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_values_and_tensors_are_those_that_were_written(write: Write) -> None:
    values = {
        "llama.block_count": 2,
        "llama.rope.freq_base": 0.5,
        "flag": True,
        "text": "naïve ☃",
        "words": ["a", "", "ĠĠ"],
        "numbers": [1, -2, 3],
        "shares": [0.25, 0.5],
    }
    path = write(values, {"norm": ("F32", floats(4)), "matrix": ("Q4_K", ROWS)})
    file = GgufFile.open(path)
    assert file.metadata["general.architecture"] == "llama"
    assert {key: file.metadata[key] for key in values} == values
    assert (file.tensors["matrix"].shape, file.tensors["matrix"].type) == ((3, 512), "Q4_K")
    assert (file.tensors["matrix"].read() == ROWS).all()
    assert (file.tensors["matrix"].read(1, 2) == ROWS[1:2]).all()
    assert file.tensors["norm"].read().view(np.float32)[0].tolist() == [0, 1, 2, 3]


def test_gguf_files_are_known_by_their_beginning_or_name(write: Write, tmp_path: Path) -> None:
    path = write({}, {})
    renamed = path.rename(tmp_path / "blob")
    (tmp_path / "other").write_bytes(b"other")
    (tmp_path / "empty.gguf").write_bytes(b"")
    assert is_gguf(renamed)
    assert is_gguf(tmp_path / "empty.gguf")
    assert not is_gguf(tmp_path / "other")
    assert not is_gguf(tmp_path / "missing.gguf")
    assert not is_gguf(tmp_path)


def test_a_file_cut_anywhere_is_refused_with_what_was_expected(write: Write, tmp_path: Path) -> None:
    path = write({"words": ["one", "two"], "number": 3}, {"matrix": ("Q4_K", ROWS), "norm": ("F32", floats(64))})
    whole = path.read_bytes()
    assert GgufFile.open(path).tensors["norm"].offset + 256 == len(whole)
    cut = tmp_path / "cut.gguf"
    for num_bytes in {*range(0, 400), *range(400, len(whole), 97), len(whole) - 1}:
        cut.write_bytes(whole[:num_bytes])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            GgufFile.open(cut)
    cut.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=f"tensor norm ends at byte {len(whole)}, but the file has"):
        GgufFile.open(cut)


def test_no_byte_changed_in_the_header_gives_another_error_than_ours(write: Write, tmp_path: Path) -> None:
    path = write({"words": ["one"], "numbers": [1, 2]}, {"norm": ("F32", floats(8))})
    whole = path.read_bytes()
    changed = tmp_path / "changed.gguf"
    num_refused = 0
    for at in range(len(whole) - 32):
        for value in (0x00, 0x7F, 0xFF):
            changed.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            try:
                GgufFile.open(changed)
            except CheckpointError:
                num_refused += 1
    assert num_refused > len(whole)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"PK\x03\x04" + bytes(20), "is no GGUF file; it begins with b'PK"),
        (b"", "is no GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1 is not supported, expected 2 or 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**60), "the name of a value needs 1152921504606"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sI", 1, b"a", 77), "a is of type 77"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"a", 9, 9, 1),
            "a is a list of lists",
        ),
    ],
)
def test_what_is_no_supported_gguf_is_refused_by_name(header: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(header)
    with pytest.raises(CheckpointError, match=message):
        GgufFile.open(tmp_path / "model.gguf")


def test_a_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.gguf: not readable \(No such file"):
        GgufFile.open(tmp_path / "model.gguf")


def test_a_file_that_becomes_shorter_is_refused_when_it_is_read(write: Write) -> None:
    path = write({}, {"matrix": ("Q4_K", ROWS)})
    tensor = GgufFile.open(path).tensors["matrix"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="has become shorter and ends within tensor matrix"):
        tensor.read()
    assert len(tensor.read(0, 2)) == 2


def parts(write: Write, *, count: int = 2, numbers: tuple[int, ...] = (0, 1), total: int = 2) -> list[Path]:
    """Two parts of a model, which the writer of the gguf package cannot number by itself."""
    written = []
    for place, number in enumerate(numbers):
        values = {"split.no": number, "split.count": count, "split.tensors.count": total}
        if place == 0:
            values["llama.block_count"] = 7
        name = f"big-{place + 1:05}-of-{len(numbers):05}.gguf"
        written.append(write(values, {f"t{place}": ("F32", floats(8) + place)}, name))
    return written


def test_parts_are_read_together_from_any_of_them(write: Write) -> None:
    for path in parts(write):
        file = GgufFile.open(path)
        assert file.metadata["llama.block_count"] == 7
        assert file.tensors["t1"].read().view(np.float32)[0, 0] == 1.0
        assert file.tensors["t0"].read().view(np.float32)[0, 0] == 0.0


def test_a_missing_part_is_named(write: Write) -> None:
    first, second = parts(write)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"is one of 2 parts, and big-00002-of-00002\.gguf is missing"):
        GgufFile.open(first)


def test_parts_that_do_not_belong_together_are_refused(write: Write) -> None:
    first, _ = parts(write, numbers=(0, 0))
    with pytest.raises(CheckpointError, match="says that it is part 0 of 2, expected part 1 of 2"):
        GgufFile.open(first)
    first, _ = parts(write, total=3)
    with pytest.raises(CheckpointError, match="its 2 parts have 2 tensors, expected 3"):
        GgufFile.open(first)
    with pytest.raises(CheckpointError, match="which must keep names as model-00001-of-00002"):
        GgufFile.open(first.rename(first.with_name("one.gguf")))
