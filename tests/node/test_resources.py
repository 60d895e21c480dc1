"""What a node says of itself, and the account of its memory."""

from __future__ import annotations

import pathlib

import pytest

from flowspec_edge.core import wire
from flowspec_edge.node.resources import MemoryAccount, NodeSettings, available_memory_bytes, unique_name
from flowspec_edge.version import __version__
from tests.fake_links import FakeLink

GIB = 2**30


async def test_what_stages_reserve_is_not_free_until_they_give_it_back() -> None:
    memory, one, other = MemoryAccount(GIB), FakeLink("attic"), FakeLink("cellar")
    with memory.reserve(one, 300):
        with memory.reserve(other, 500):
            assert memory.free_bytes == GIB - 800
        assert memory.free_bytes == GIB - 300
    assert memory.free_bytes == memory.offered_bytes == GIB


async def test_the_memory_of_a_stage_that_is_ending_counts_as_free() -> None:
    memory, control = MemoryAccount(GIB), FakeLink("attic")
    with memory.reserve(control, 300):
        control.cut()
        assert memory.free_bytes == GIB


async def test_a_failed_stage_gives_its_memory_back() -> None:
    memory = MemoryAccount(GIB)
    with pytest.raises(ValueError, match="broken"), memory.reserve(FakeLink("attic"), 300):
        raise ValueError("broken")
    assert memory.free_bytes == GIB


async def test_more_than_is_offered_leaves_nothing_and_not_less() -> None:
    memory = MemoryAccount(100)
    with memory.reserve(FakeLink("attic"), 300):
        assert memory.free_bytes == 0


def test_a_node_offers_four_fifths_of_what_is_available(tmp_path: pathlib.Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 8000 kB\nMemFree: 100 kB\nMemAvailable: 5000 kB\n")
    assert available_memory_bytes(meminfo) == 4000 * 1024
    meminfo.write_text("MemTotal: 8000 kB\n")
    assert available_memory_bytes(meminfo) == 0


def test_a_hello_names_the_node_the_purpose_and_the_ring() -> None:
    settings = NodeSettings(name="pi-hall", cluster="test")
    hello = settings.hello(wire.DATA, "ring-1/2")
    assert hello == wire.Hello("pi-hall", __version__, wire.PROTOCOL_VERSION, wire.DATA, "ring-1/2")


def test_names_are_told_apart() -> None:
    assert len({unique_name() for _ in range(100)}) == 100
