"""Cases, drawn by hypothesis so that a falsifying one is made as small as it can be."""

from __future__ import annotations

from hypothesis import strategies as st

from flowspec_edge.config import GenerateOptions
from flowspec_edge.core.speculation.schedules import SCHEDULES
from tests.interleavings.cases import FAULTS, Case, Fault, Request

OPTIONS = st.builds(
    GenerateOptions,
    max_new_tokens=st.integers(1, 40),
    temperature=st.sampled_from([0.0, 0.8]),
    top_k=st.sampled_from([0, 3]),
    top_p=st.sampled_from([1.0, 0.8]),
    seed=st.integers(0, 2**16),
    schedule=st.sampled_from(sorted(SCHEDULES)),
)
PROMPTS = st.one_of(
    st.lists(st.integers(1, 12), min_size=1, max_size=12),
    st.builds(lambda token, num: [token] * num, st.integers(1, 12), st.sampled_from([127, 128, 129, 200, 300])),
).map(tuple)
REQUESTS = st.builds(Request, after=st.sampled_from([0, 0, 5, 40, 300]), prompt=PROMPTS, options=OPTIONS)
FAULT = st.builds(
    Fault,
    after=st.one_of(st.integers(0, 12), st.integers(0, 60), st.integers(0, 600)),
    kind=st.sampled_from(FAULTS),
    which=st.integers(0, 255),
    detail=st.integers(0, 7),
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_boards = draw(st.integers(2, 5))
    return Case(
        seed=draw(st.integers(0, 2**32)),
        num_boards=num_boards,
        num_needed=draw(st.integers(1, num_boards)),
        requests=tuple(draw(st.lists(REQUESTS, min_size=1, max_size=3))),
        faults=tuple(draw(st.lists(FAULT, max_size=9))),
        skill=draw(st.sampled_from([0.0, 0.5, 0.9, 1.0])),
        taps=draw(st.sampled_from([(), (), (2, 4, 5)])),
        pace_s=draw(st.sampled_from([0.0, 0.01, 0.05])),
        is_strict=draw(st.booleans()),
        moves_at_once=draw(st.booleans()),
        wait_s=draw(st.sampled_from([0.0, 3.0, 20.0])),
        max_context=draw(st.sampled_from([512, 512, 512, 512, 40])),
    )
