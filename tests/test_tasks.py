"""An error of a thread keeps nothing in memory that was used there."""

import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from flowspec_edge.errors import StageFailedError
from flowspec_edge.tasks import in_thread


class Layers:
    """Something large."""


async def test_an_error_of_a_thread_lets_go_of_what_it_was_raised_over() -> None:
    used: list[weakref.ref[Layers]] = []

    def read() -> None:
        layers = Layers()
        used.append(weakref.ref(layers))
        raise OSError("the card is broken")

    def run() -> None:
        layers = Layers()
        used.append(weakref.ref(layers))
        try:
            read()
        except OSError as cause:
            raise StageFailedError("no forward") from cause

    with ThreadPoolExecutor(1) as executor, pytest.raises(StageFailedError, match="no forward") as failed:
        await in_thread(executor, run)
    assert str(failed.value.__cause__) == "the card is broken"
    assert [layers() for layers in used] == [None, None]


async def test_what_a_function_returns_is_handed_on() -> None:
    with ThreadPoolExecutor(1) as executor:
        assert await in_thread(executor, divmod, 7, 2) == (3, 1)
