"""The origin's timer: every deadline is told once, at a time at which it has passed."""

import asyncio
import time
from types import SimpleNamespace

import pytest

from flowspec_edge.core import events as ev
from flowspec_edge.node.pacing import Board
from flowspec_edge.origin.ring import Ring, RingLinks
from tests.fake_links import FakeLink


class Core:
    """A core that does nothing but wait for its deadline."""

    def __init__(self):
        self.deadline = None
        self.told = asyncio.Queue()

    def handle(self, event, now):
        self.told.put_nowait((event, now))
        return []

    def next_deadline(self):
        return self.deadline


@pytest.fixture
async def ring():
    links = RingLinks([], FakeLink("first"), FakeLink("last"))
    async with Ring(Core(), SimpleNamespace(drafter=None), [], links, Board()) as ring:
        yield ring


async def next_told(ring):
    async with asyncio.timeout(5):
        return await ring._core.told.get()


async def test_a_deadline_is_told_when_it_has_passed(ring):
    ring._core.deadline = deadline = time.monotonic() + 0.002
    ring._tell(ev.CreditArrived(1))
    assert (await next_told(ring))[0] == ev.CreditArrived(1)
    event, now = await next_told(ring)
    assert event == ev.DeadlinePassed()
    assert now >= deadline


async def test_a_deadline_that_has_passed_and_stands_is_told_once(ring):
    ring._core.deadline = time.monotonic() - 1
    for _ in range(3):
        ring._tell(ev.CreditArrived(1))
        await next_told(ring)
    assert (await next_told(ring))[0] == ev.DeadlinePassed()
    for _ in range(100):
        await asyncio.sleep(0)
    assert ring._core.told.empty()


async def test_a_deadline_that_was_taken_back_is_not_told(ring):
    ring._core.deadline = time.monotonic()
    ring._tell(ev.CreditArrived(1))
    ring._core.deadline = None
    ring._tell(ev.CreditArrived(2))
    for _ in range(100):
        await asyncio.sleep(0)
    assert [(await next_told(ring))[0] for _ in range(2)] == [ev.CreditArrived(1), ev.CreditArrived(2)]
    assert ring._core.told.empty()


async def test_a_new_deadline_takes_the_place_of_the_last(ring):
    ring._core.deadline = time.monotonic() + 1000
    ring._tell(ev.CreditArrived(1))
    await next_told(ring)
    ring._core.deadline = time.monotonic()
    ring._tell(ev.CreditArrived(1))
    await next_told(ring)
    assert (await next_told(ring))[0] == ev.DeadlinePassed()
