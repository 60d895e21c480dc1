"""Weights move to huge pages where the system has them, nothing else does, and no memory is added."""

import mmap
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from flowspec_edge.allocator import give_back_freed
from flowspec_edge.engine import huge_pages
from flowspec_edge.engine.graphs import load_graph
from flowspec_edge.engine.huge_pages import SETTINGS, _without, huge_page_bytes, on_huge_pages

MB = 1 << 20


def collapses_on_request() -> bool:
    """Whether Linux moves memory when it is asked to, and only then: since 6.1; earlier ones take their time."""
    version = re.match(r"(\d+)\.(\d+)", platform.release())
    if version is None or tuple(map(int, version.groups())) < (6, 1) or not 0 < huge_page_bytes() <= 2 * MB:
        return False
    return "[madvise]" in (SETTINGS / "enabled").read_text()


needs_huge_pages = pytest.mark.skipif(not collapses_on_request(), reason="no huge pages on request, or unasked")


def memory() -> tuple[int, int]:
    """Bytes of this process: (on huge pages, at all)."""
    fields = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    on_huge, at_all = (int(fields[name].split()[0]) * 1024 for name in ("AnonHugePages", "Rss"))
    return on_huge, at_all


@needs_huge_pages
def test_weights_are_on_huge_pages_and_take_no_more_memory(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((4096, 2048), np.float32)  # 32 MB
    given = helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["num_rows", 4096])
    found = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["num_rows", 2048])
    product = helper.make_node("MatMul", ["rows", "weight"], ["out"])
    graph = helper.make_graph([product], "product", [given], [found], [numpy_helper.from_array(weight, "weight")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, tmp_path / "product.onnx")
    num_bytes = weight.nbytes
    expected = weight[:2].sum(axis=0)
    del weight, graph, model
    give_back_freed()  # or the session would take over the huge pages that numpy had for the weight
    huge_before, all_before = memory()
    session = load_graph(tmp_path / "product.onnx", 1)
    huge, everything = memory()
    assert huge - huge_before > num_bytes / 2
    assert everything - all_before < num_bytes + 16 * MB
    rows = np.zeros((1, 4096), np.float32)
    rows[0, :2] = 1
    np.testing.assert_allclose(session.run(None, {"rows": rows})[0][0], expected, rtol=1e-5, atol=1e-6)


@needs_huge_pages
def test_memory_that_is_hardly_used_stays_so() -> None:
    _, before = memory()
    with on_huge_pages():
        reserved = mmap.mmap(-1, 64 * MB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for first in range(0, 64 * MB, MB):
            reserved[first] = 1
    _, after = memory()
    reserved.close()
    assert after - before < 8 * MB


def test_a_mapped_file_may_have_any_name(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/not utf-8 \xe9 \xe2\x80\xa8 \x85"
    with open(path, "wb") as made:
        made.write(bytes(MB))
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped, on_huge_pages():
        assert mapped[0] == 0


def test_a_system_that_does_not_tell_its_mappings_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huge_pages, "_MAPPINGS", tmp_path / "none")
    monkeypatch.setattr(huge_pages, "huge_page_bytes", lambda: 2 * MB)
    with on_huge_pages():
        np.ones(8 * MB, np.uint8)


@pytest.mark.parametrize(
    ("enabled", "size", "expected"),
    [
        ("always [madvise] never\n", "2097152\n", 2 * MB),
        ("[always] madvise never\n", "33554432\n", 32 * MB),
        ("always madvise [never]\n", "2097152\n", 0),
        ("always [madvise] never\n", None, 0),
        (None, None, 0),
    ],
)
def test_what_the_system_says_of_huge_pages(
    tmp_path: Path, enabled: str | None, size: str | None, expected: int
) -> None:
    for name, text in (("enabled", enabled), ("hpage_pmd_size", size)):
        if text is not None:
            (tmp_path / name).write_text(text)
    assert huge_page_bytes(tmp_path) == expected


ranges = st.lists(st.integers(0, 40), max_size=8, unique=True).map(
    lambda cuts: list(zip(sorted(cuts)[::2], sorted(cuts)[1::2], strict=False))
)


@given(ranges, ranges)
def test_what_is_in_the_first_ranges_alone(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    def places(of: Sequence[tuple[int, int]]) -> set[int]:
        return {place for start, stop in of for place in range(start, stop)}

    found = _without(first, second)
    assert places(found) == places(first) - places(second)
    assert all(start < stop for start, stop in found)
