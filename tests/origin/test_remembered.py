"""What an origin remembers of a bundle is private, checked when it is read, and never needed."""

import logging
from pathlib import Path

import pytest

from flowspec_edge.core.planning.draft_gain import DraftGain
from flowspec_edge.origin.remembered import learn_draft_gain, load_draft_gain

DIGEST = "c0ffee" * 10


@pytest.fixture
def kept(state: Path) -> Path:
    """The file in which it is kept."""
    return state / "draft-gains" / f"{DIGEST[:16]}.json"


def test_what_drafts_brought_is_there_for_the_next_run(kept: Path) -> None:
    assert load_draft_gain(DIGEST) == DraftGain()
    learn_draft_gain(DIGEST, 0.4, 150)
    assert load_draft_gain(DIGEST) == DraftGain(0.55, 150)
    assert kept.stat().st_mode & 0o777 == 0o600
    assert load_draft_gain("beef" * 16) == DraftGain(), "of another bundle"


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"factor": 1e9, "num_tokens": 5}', '{"factor": NaN, "num_tokens": 5}', "{}"]
)
def test_a_file_that_others_broke_is_as_good_as_none(kept: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    learn_draft_gain(DIGEST, 0.4, 150)
    kept.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert load_draft_gain(DIGEST) == DraftGain()
    assert "not used" in caplog.text
    learn_draft_gain(DIGEST, 0.4, 150)
    assert load_draft_gain(DIGEST) == DraftGain(0.55, 150)


def test_a_directory_that_cannot_be_written_ends_no_text(
    kept: Path, state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state.mkdir(exist_ok=True)
    (state / "draft-gains").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        learn_draft_gain(DIGEST, 0.4, 150)
    assert "draft-gains" in caplog.text
