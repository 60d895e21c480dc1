"""A bundle's manifest, for what needs its geometry and blocks; nothing is loaded from it."""

from __future__ import annotations

import pytest

from flowspec_edge.bundle import DEMO_BUNDLE, Bundle


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    return Bundle.load(DEMO_BUNDLE)
