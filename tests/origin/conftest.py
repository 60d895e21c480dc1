"""A bundle, of which nothing is loaded but its manifest."""

from __future__ import annotations

import pytest

from flowspec_edge.bundle import DEMO_BUNDLE, Bundle


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    return Bundle.load(DEMO_BUNDLE)
