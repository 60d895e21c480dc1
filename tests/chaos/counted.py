"""``flowspec`` that counts its tasks when it is asked to: ``python -m tests.chaos.counted FILE ARGUMENT ...``.

At SIGUSR1 it writes a JSON object to FILE: how many tasks its event loop has, how many blocks of memory its objects
take, how many layers are loaded, how many stages serve, and how many threads are of the event loop's own pool, which
grows to its limit as it is used. Whoever asks sees a new file appear.

It must not look through all objects: ``gc.get_objects`` gives out tuples that another thread is still building, which
then fails with a SystemError (bpo-15108).
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

from flowspec_edge.cli.main import main
from flowspec_edge.engine.stage_runner import StageRunner

RUNNERS: weakref.WeakSet[StageRunner] = weakref.WeakSet()


def remember_runners() -> None:
    make = StageRunner.__init__

    def make_and_remember(runner: StageRunner, *arguments: Any, **options: Any) -> None:
        RUNNERS.add(runner)
        make(runner, *arguments, **options)

    StageRunner.__init__ = make_and_remember  # type: ignore[method-assign, assignment]  # for this process alone


def count(path: Path) -> None:
    tasks: set[asyncio.Task[object]] = set()
    with contextlib.suppress(RuntimeError):  # the loop does not run yet, or any more
        tasks = asyncio.all_tasks()
    layers = [runner._num_layers for runner in RUNNERS if getattr(runner, "_blocks", ())]
    counts = {"num_tasks": len(tasks), "num_blocks": sys.getallocatedblocks(), "num_layers": sum(layers)}
    counts["num_stages"] = sum(task.get_name().startswith("stage behind ") for task in tasks)
    counts["num_pooled"] = sum(thread.name.startswith("asyncio_") for thread in threading.enumerate())
    part = path.with_suffix(".part")
    part.write_text(json.dumps(counts))
    os.replace(part, path)


if __name__ == "__main__":
    remember_runners()
    told_to = Path(sys.argv[1])
    signal.signal(signal.SIGUSR1, lambda *_: count(told_to))
    sys.exit(main(sys.argv[2:]))
