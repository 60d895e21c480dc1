"""Cases, drawn by hypothesis so that a falsifying one is made as small as it can be."""

from __future__ import annotations

from hypothesis import strategies as st

from flowspec_edge.config import GenerateOptions
from flowspec_edge.core.speculation.schedules import SCHEDULES
from tests.interleavings.cases import FAULTS, Case, Fault, Request

RING_FAULTS = (
    "link lost",
    "link lost, one end sees it",
    "board killed",
    "board restarted",
    "stage fails",
    "board back",
)
"""What costs a text its ring, one after another."""
LOSSES = ("link lost", "stage fails", "board restarted")
"""Of these the ones that leave all boards there."""

OPTIONS = st.builds(
    GenerateOptions,
    max_new_tokens=st.integers(1, 28),
    temperature=st.sampled_from([0.0, 0.8]),
    top_k=st.sampled_from([0, 3]),
    top_p=st.sampled_from([1.0, 0.8]),
    seed=st.integers(0, 2**16),
    schedule=st.sampled_from(sorted(SCHEDULES)),
)
SHORT = st.lists(st.integers(1, 12), min_size=1, max_size=12).map(tuple)
LONG = st.builds(lambda token, num: (token,) * num, st.integers(1, 12), st.sampled_from([128, 129, 200]))
"""Two prefill chunks, or just one."""
PROMPTS = st.one_of(*[SHORT] * 7, LONG)


def requests(prompts: st.SearchStrategy[tuple[int, ...]]) -> st.SearchStrategy[Request]:
    return st.builds(Request, after=st.sampled_from([0, 0, 5, 40, 300]), prompt=prompts, options=OPTIONS)


def faults(kinds: tuple[str, ...], after: st.SearchStrategy[int]) -> st.SearchStrategy[Fault]:
    return st.builds(
        Fault, after=after, kind=st.sampled_from(kinds), which=st.integers(0, 255), detail=st.integers(0, 7)
    )


ANY_TIME = st.one_of(st.integers(0, 12), st.integers(0, 60), st.integers(0, 400))
FEW = st.lists(faults(FAULTS, ANY_TIME), max_size=6)
MANY = st.lists(faults(RING_FAULTS, ANY_TIME), min_size=7, max_size=14)
"""A text loses ring after ring, with tokens in between or without."""
TOO_MANY = st.lists(faults(LOSSES, st.integers(0, 30)), min_size=7, max_size=10)
"""A text loses ring after ring before any has brought a token."""


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_boards = draw(st.integers(2, 5))
    max_context = draw(st.sampled_from([512, 512, 512, 512, 40]))
    prompts = SHORT if max_context < 128 and draw(st.booleans()) else PROMPTS
    return Case(
        seed=draw(st.integers(0, 2**32)),
        num_boards=num_boards,
        num_needed=draw(st.integers(1, num_boards)),
        requests=tuple(draw(st.lists(requests(prompts), min_size=1, max_size=3))),
        faults=tuple(draw(st.one_of(FEW, FEW, FEW, FEW, FEW, MANY, TOO_MANY))),
        skill=draw(st.sampled_from([0.0, 0.5, 0.9, 1.0])),
        taps=draw(st.sampled_from([(), (), (2, 4, 5)])),
        pace_s=draw(st.sampled_from([0.0, 0.01, 0.05])),
        is_strict=draw(st.booleans()),
        moves_at_once=draw(st.booleans()),
        wait_s=draw(st.sampled_from([0.0, 3.0, 30.0])),
        max_context=max_context,
    )
