"""Padding is the least that is needed, and with ARM's a draft is the same in every pass here as well."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowspec_edge.bundle import Bundle
from flowspec_edge.core.events import RunDraft
from flowspec_edge.engine import padding
from flowspec_edge.engine.drafters.eagle1 import Eagle1Drafter
from flowspec_edge.engine.head import Head
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


def test_arms_padding_changes_no_draft(
    bundle: Bundle, whole: StageRunner, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = Eagle1Drafter(bundle.directory, bundle.manifest, Head(bundle.directory, bundle.manifest), k=5)
    chain = make_chain(tokens[:24])
    hidden = Session(whole).run(chain)

    def drafts(num_rows: int) -> list[np.ndarray]:
        drafter.open(1, 24 + 1)
        parts = [slice(start, min(start + num_rows, 23)) for start in range(0, 23, num_rows)]
        rows = chain[1:]
        return [
            drafter.run(RunDraft(1, tuple(rows[part]), np.arange(24)[part], hidden[part], ())).log_probs
            for part in parts
        ]

    (expected,) = drafts(23)
    monkeypatch.setattr(padding, "SLOTS_AT_A_TIME", ARM)
    for num_rows in (1, 2, 3, 5, 23):
        np.testing.assert_array_equal(drafts(num_rows)[-1], expected)
