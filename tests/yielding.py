"""Processes that compute beside others, in the time that these leave."""

import os
import signal


def yield_to_others() -> None:
    """From now on this process, and what it starts, runs where a core would else have nothing to do (Linux). Ctrl-C is
    for whoever started it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
