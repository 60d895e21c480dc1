"""A few seconds of what ``make chaos`` does for minutes: outsiders do all that they can, and a member is served."""

from __future__ import annotations

import pytest

from tests.chaos.outsiders import Service, as_markdown, complaints, try_outsiders

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("lan_is_possible")]
TRIED = {"silent", "slow", "garbage", "shake_hands", "replay", "forged records"}
BUSY_S = 2.0
"""How long a greeting may take where other tests have the processors too. ``make chaos`` is stricter."""


async def test_a_member_is_served_while_outsiders_misbehave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.chaos.outsiders.SERVED_S", BUSY_S)
    report = await try_outsiders(2.5, 0.0, seed=1, each=False)
    assert report["found"] == []
    (tried,) = (figures["tried"] for name, figures in report["by_kind"].items() if name == "all at once")
    assert set(tried) >= TRIED, "each has tried something"
    assert "| all at once | " in as_markdown(report)


def test_what_is_slow_or_missing_is_found() -> None:
    assert complaints(Service(greetings=[0.1], gaps=[0.05], num_texts=1), {}) == []
    found = complaints(Service(greetings=[0.1, 0.3], failures=["refused"]), {"answered without the key": 1})
    assert found == ["a greeting took 0.300 s", "refused", "no text", "the node answered one without the key"]
