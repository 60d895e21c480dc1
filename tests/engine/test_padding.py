"""Padding is the least that is needed, and with ARM's a row has the same bits in every chunk here as well."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowspec_edge.engine import padding
from flowspec_edge.engine.padding import MAX_ATTENTION_PADDING, MIN_ATTENTION_ROWS, attention_padding
from flowspec_edge.engine.stage_runner import StageRunner
from tests.engine.conftest import Session, make_chain

ARM = 4


@given(st.sampled_from([1, ARM]), st.integers(1, 80), st.integers(0, 2000))
def test_it_is_the_least_that_is_needed(slots_at_a_time: int, num_rows: int, num_before: int) -> None:
    num_slots = num_before + num_rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(padding, "SLOTS_AT_A_TIME", slots_at_a_time)
        found = attention_padding(num_rows, num_slots)
    enough = [
        number
        for number in range(MAX_ATTENTION_PADDING + 1)
        if num_rows + number >= MIN_ATTENTION_ROWS and (num_slots + number) % slots_at_a_time == 0
    ]
    assert found == enough[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model name\t: x\nflags\t\t: fpu sse4_2 avx avx2 fma\n", 1),
        ("flags\t\t: fpu sse4_2 avx avx2x\n", 4),  # an Atom's, or of before 2013
        ("Features\t: fp asimd asimddp\n", 4),
        (None, 4),
    ],
)
def test_processors_that_mask_need_no_multiple(tmp_path: Path, text: str | None, expected: int) -> None:
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert padding.slots_at_a_time(tmp_path / "cpuinfo") == expected


def test_arms_padding_changes_no_bit(whole: StageRunner, tokens: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    chain = make_chain(tokens[:24])
    expected = Session(whole).run(chain)
    monkeypatch.setattr(padding, "SLOTS_AT_A_TIME", ARM)
    for num_rows in (1, 2, 3, 5, 24):
        session = Session(whole, capacity=24 + 1)  # full at the end: padding has room of its own
        found = [session.run(chain[start : start + num_rows]) for start in range(0, 24, num_rows)]
        np.testing.assert_array_equal(np.concatenate(found), expected)
