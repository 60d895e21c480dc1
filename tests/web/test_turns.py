"""Who may have a text written, and in which order."""

import asyncio
import contextlib

import pytest

from flowspec_edge.errors import ServerBusyError
from flowspec_edge.web.turns import Holder, TurnLimits, Turns


async def test_texts_have_their_turns_in_the_order_of_their_coming() -> None:
    turns, order = Turns(TurnLimits(max_sessions=2, max_queue=9, max_per_address=9)), list[int]()
    gates = [asyncio.Event() for _ in range(5)]

    async def write(number: int) -> None:
        with turns.place(Holder("pi")):
            async with turns.turn():
                order.append(number)
                await gates[number].wait()

    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        for number in range(5):
            group.create_task(write(number))
        for done, begun in ((0, [0, 1]), (1, [0, 1, 2]), (2, [0, 1, 2, 3]), (3, [0, 1, 2, 3, 4])):
            for _ in range(5):
                await asyncio.sleep(0)
            assert order == begun
            gates[done].set()
        gates[4].set()


def test_places_are_bounded_in_total_and_per_address_and_come_back() -> None:
    turns = Turns(TurnLimits(max_sessions=1, max_queue=2, max_per_address=2))
    with contextlib.ExitStack() as places:
        for address in ("pi", "pi", "laptop"):
            places.enter_context(turns.place(Holder(address)))
        for address, is_crowded_by_one in (("phone", False), ("pi", False)):
            with pytest.raises(ServerBusyError, match="3 texts") as busy, turns.place(Holder(address)):
                pass
            assert busy.value.is_crowded_by_one is is_crowded_by_one
    with turns.place(Holder("pi")), turns.place(Holder("pi")):
        with pytest.raises(ServerBusyError, match="pi has 2 texts") as busy, turns.place(Holder("pi")):
            pass
        assert busy.value.is_crowded_by_one
        with turns.place(Holder("laptop")):
            pass


def test_so_many_places_at_once_or_none() -> None:
    turns = Turns(TurnLimits(max_sessions=2, max_queue=2, max_per_address=3))
    assert turns.most_texts(Holder("pi")) == 3
    with turns.place(Holder("pi")):
        for address, num_texts, text in (("pi", 3, "pi has 1 texts"), ("phone", 4, "1 texts to write, and 4 more")):
            with pytest.raises(ServerBusyError, match=text), turns.place(Holder(address), num_texts=num_texts):
                pass
        with turns.place(Holder("pi"), num_texts=2), turns.place(Holder("phone")):
            pass
    with turns.place(Holder("pi"), num_texts=3):
        pass
