"""For every test, and every process it starts: a place of its own for what a node keeps, without a cluster key."""

import pytest

from flowspec_edge.state import STATE_VARIABLE


@pytest.fixture(autouse=True)
def state(tmp_path_factory, monkeypatch):
    """The directory; see flowspec_edge/state.py."""
    directory = tmp_path_factory.mktemp("state")
    monkeypatch.setenv(STATE_VARIABLE, str(directory))
    return directory
