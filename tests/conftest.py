"""For every test, and every process it starts: a place of its own for what a node keeps, without a cluster key."""

from pathlib import Path

import pytest

from flowspec_edge.files import STATE_VARIABLE
from tests.lan import why_not


@pytest.fixture(autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory; see flowspec_edge/state.py."""
    directory = tmp_path_factory.mktemp("state")
    monkeypatch.setenv(STATE_VARIABLE, str(directory))
    return directory


@pytest.fixture(scope="session")
def lan_is_possible() -> None:
    """Skips where hosts with addresses of their own cannot be made."""
    if reason := why_not():
        pytest.skip(reason)
