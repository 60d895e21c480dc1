"""Rows of an embedding table, from a file that may change meanwhile."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.core import events as ev
from flowspec_edge.core.rows import NO_PARENT, Row
from flowspec_edge.core.speculation.drafting import DraftShape
from flowspec_edge.engine.embedding import Embedding
from flowspec_edge.errors import BundleError
from flowspec_edge.origin.engine import KeptEngine, OriginEngine

TABLE = np.arange(40, dtype=np.float16).reshape(10, 4)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    np.save(tmp_path / "embedding.npy", TABLE)
    return tmp_path / "embedding.npy"


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rows_are_those_of_the_tokens_in_float32(path: Path, dtype: type[np.floating]) -> None:
    np.save(path, TABLE.astype(dtype))
    embedding = Embedding(path)
    assert embedding.shape == (10, 4)
    found = embedding.rows([9, 0, 9, 3])
    assert found.dtype == np.float32 and np.array_equal(found, TABLE[[9, 0, 9, 3]].astype(np.float32))
    assert embedding.rows([]).shape == (0, 4)


@pytest.mark.parametrize("how", ["cut off", "cut off to nothing", "written over", "longer"])
def test_a_file_that_is_changed_in_place_is_named_and_not_read_on(path: Path, how: str) -> None:
    embedding = Embedding(path)
    data = path.read_bytes()
    assert embedding.rows([0]).shape == (1, 4)
    os.utime(path, ns=(0, 0))  # or the next change may come within the same tick of the kernel's clock
    embedding = Embedding(path)
    changed = {
        "cut off": data[:-8],
        "cut off to nothing": b"",
        "written over": data[:-1] + b"\x11",
        "longer": data + b"x",
    }
    with open(path, "r+b") as file:
        file.truncate(0)
        file.write(changed[how])
    with pytest.raises(BundleError, match=r"embedding.npy: the file has changed while it was in use"):
        embedding.rows([9])


def test_a_file_that_another_one_replaces_is_read_on_as_it_was(path: Path, tmp_path: Path) -> None:
    embedding = Embedding(path)
    np.save(tmp_path / "other.npy", np.zeros((1, 4), np.float16))
    (tmp_path / "other.npy").replace(path)
    assert np.array_equal(embedding.rows([9]), TABLE[[9]].astype(np.float32))
    path.unlink()
    assert np.array_equal(embedding.rows([9]), TABLE[[9]].astype(np.float32))


def test_it_is_closed_when_nobody_has_it_any_more(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    embedding = Embedding(path)
    embedding.rows([1])
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del embedding
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY\x09\x00v\x00{}",
        np.zeros((2, 2, 2), np.float32),
        np.zeros((3, 4), np.int64),
        np.zeros((3, 4), np.float32, order="F"),
        np.array([{"a": 1}], dtype=object),
    ],
)
def test_what_is_no_table_is_named(path: Path, content: bytes | np.ndarray) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(BundleError, match=r"embedding.npy: no embedding table"):
        Embedding(path)


def test_a_table_that_ends_early_or_is_not_there_is_named(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match="ends before its last row"):
        Embedding(path)
    path.unlink()
    with pytest.raises(BundleError, match="No such file"):
        Embedding(path)


def test_a_drafter_over_a_changed_table_serves_no_other_ring(tmp_path: Path) -> None:
    bundle = Bundle.load(shutil.copytree(DEMO_BUNDLE, tmp_path / "bundle"))
    file = bundle.directory / bundle.manifest.embedding.file
    hidden = np.zeros((1, bundle.manifest.geometry.hidden_size), np.float32)
    job = ev.RunDraft(1, (Row(0, NO_PARENT, 5),), np.zeros(1, np.int64), hidden, ())
    kept, whole = KeptEngine(), file.read_bytes()

    def load() -> OriginEngine:
        engine = kept.load(bundle, 1, DraftShape())
        assert engine.drafter is not None
        engine.drafter.open(1, 64)
        return engine

    engine = load()
    engine.run(job)
    with open(file, "r+b") as changed:
        changed.truncate(100)
    with pytest.raises(BundleError, match="has changed while it was in use"):
        engine.run(job)
    engine.close()
    with pytest.raises(BundleError, match=r"embedding.npy: .*bytes"):
        load()
    file.write_bytes(whole)
    load().run(job)
