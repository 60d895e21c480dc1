"""Commands as a terminal starts them, whatever started the tests."""

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def ctrl_c_is_heeded() -> Iterator[None]:
    """Heed SIGINT: a shell without a terminal ignores it in background jobs, and processes inherit that."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
