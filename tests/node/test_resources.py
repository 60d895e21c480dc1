"""What a node says of itself, and the account of its memory."""

from __future__ import annotations

import contextlib
import pathlib

import pytest

from flowspec_edge.core import wire
from flowspec_edge.errors import StageFailedError
from flowspec_edge.node.resources import (
    MAX_STAGES,
    MAX_STAGES_PER_PEER,
    MemoryAccount,
    NodeSettings,
    OpenStages,
    available_memory_bytes,
    unique_name,
)
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


async def test_more_than_is_free_is_refused_before_anything_is_loaded() -> None:
    memory, one = MemoryAccount(500 * 2**20), FakeLink("attic")
    with memory.reserve(one, 300 * 2**20):
        with (
            pytest.raises(StageFailedError, match=r"has 200 MiB free of the 500 .* these layers need 201; .*--memory"),
            memory.reserve(FakeLink("cellar"), 201 * 2**20),
        ):
            pass
        assert memory.free_bytes == 200 * 2**20
        one.cut()
        with memory.reserve(FakeLink("cellar"), 500 * 2**20):
            assert memory.free_bytes == 0


def test_so_many_stages_are_open_for_one_peer_and_so_many_in_all() -> None:
    stages = OpenStages()
    with contextlib.ExitStack() as held:
        for _ in range(MAX_STAGES_PER_PEER):
            held.enter_context(stages.admit("origin"))
        with pytest.raises(StageFailedError, match=r"has 8 stages of origin, the limit \(MAX_STAGES_PER_PEER\)"):
            held.enter_context(stages.admit("origin"))
        for number in range(MAX_STAGES - MAX_STAGES_PER_PEER):
            held.enter_context(stages.admit(f"origin-{number}"))
        with pytest.raises(StageFailedError, match=r"has 32 stages, the limit \(MAX_STAGES\)"):
            held.enter_context(stages.admit("another"))
    with stages.admit("origin"):
        pass
    assert not stages._num_of, "nobody is remembered"


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
