"""Commands as a terminal starts them, whatever started the tests."""

import signal

import pytest


@pytest.fixture(scope="package", autouse=True)
def ctrl_c_is_heeded():
    """Processes inherit an ignored SIGINT, and a shell that is no terminal's ignores it in what it runs in the background."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
