"""Data links and those who wait for them find each other by name, whoever comes first."""

from __future__ import annotations

import asyncio

import pytest

from flowspec_edge.core import wire
from flowspec_edge.errors import LinkLostError, ProtocolError
from flowspec_edge.node.arrivals import MAX_UNCLAIMED, Arrivals
from tests.fake_links import FakeLink, fake_pair, settle

NAME = "ring-1/2"


def data_link(name: str = NAME) -> tuple[FakeLink, FakeLink]:
    return fake_pair("attic", "hall", wire.DATA, name)


async def test_a_link_that_came_first_is_handed_over_and_closed_afterwards() -> None:
    arrivals, (near, far) = Arrivals(), data_link()
    serving = asyncio.create_task(arrivals.serve(far))
    await settle()
    async with arrivals.data_link(NAME) as link:
        assert link is far
        assert not serving.done() and near.is_open
    await serving
    assert not near.is_open


async def test_whoever_came_first_gets_the_link_of_that_name_alone() -> None:
    arrivals, (_, far), (_, other) = Arrivals(), data_link(), data_link("ring-1/3")

    async def wait() -> None:
        async with arrivals.data_link(NAME) as link:
            assert link is far

    waiting = asyncio.create_task(wait())
    await settle()
    serving = [asyncio.create_task(arrivals.serve(link)) for link in (other, far)]
    await waiting
    assert other.is_open
    await other.close()
    await asyncio.gather(*serving)


async def test_a_second_link_of_one_name_is_refused() -> None:
    arrivals, (_, far), (_, second) = Arrivals(), data_link(), data_link()
    serving = asyncio.create_task(arrivals.serve(far))
    await settle()
    with pytest.raises(ProtocolError, match=f"peer attic: a second data link {NAME}"):
        await arrivals.serve(second)
    async with arrivals.data_link(NAME) as link:
        assert link is far
    await serving


async def test_a_link_that_nobody_takes_is_refused_after_a_while() -> None:
    arrivals, (_, far) = Arrivals(limit_s=0.01), data_link()
    with pytest.raises(ProtocolError, match=f"peer attic: nobody here expected the data link {NAME}"):
        await arrivals.serve(far)
    _, again = data_link()
    with pytest.raises(ProtocolError, match="nobody here expected"):
        await arrivals.serve(again)  # the name is free again


async def test_one_that_is_expected_waits_for_as_long_as_that_takes() -> None:
    arrivals, (_, far) = Arrivals(limit_s=0.0), data_link()
    with arrivals.expect(NAME):
        serving = asyncio.create_task(arrivals.serve(far))
        await asyncio.wait({serving}, timeout=0.02)
        assert not serving.done()
        async with arrivals.data_link(NAME) as link:
            assert link is far
    await serving


async def test_once_nobody_expects_it_any_more_a_name_is_free() -> None:
    arrivals, (_, far), (_, later) = Arrivals(limit_s=0.01), data_link(), data_link()
    with arrivals.expect(NAME):
        serving = asyncio.create_task(arrivals.serve(far))
        await settle()
    arrivals.limit_s = 10.0
    second = asyncio.create_task(arrivals.serve(later))
    async with arrivals.data_link(NAME) as link:
        assert link is later
    await second
    await far.close()
    await serving


async def test_waiting_has_a_limit_unless_it_is_asked_for_without() -> None:
    arrivals, (_, far) = Arrivals(limit_s=0.0), data_link()
    with pytest.raises(LinkLostError, match=f"the data link {NAME} was not opened within 0 s"):
        async with arrivals.data_link(NAME):
            pass

    async def wait() -> None:
        async with arrivals.data_link(NAME, is_limited=False) as link:
            assert link is far

    waiting = asyncio.create_task(wait())
    await asyncio.wait({waiting}, timeout=0.02)
    assert not waiting.done()
    with arrivals.expect(NAME):
        serving = asyncio.create_task(arrivals.serve(far))
        await waiting
    await serving


async def test_only_so_many_links_may_wait_for_somebody_and_those_that_are_expected_always_may() -> None:
    arrivals = Arrivals()
    waiting = [asyncio.create_task(arrivals.serve(data_link(f"none/{n}")[1])) for n in range(MAX_UNCLAIMED)]
    await settle()
    with pytest.raises(ProtocolError, match="peer attic: 64 data links wait here .*MAX_UNCLAIMED"):
        await arrivals.serve(data_link("none/more")[1])
    with arrivals.expect(NAME):
        waiting.append(asyncio.create_task(arrivals.serve(data_link()[1])))
        async with arrivals.data_link(NAME) as link:
            assert link.is_open
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
