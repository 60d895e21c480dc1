"""``flowspec`` that counts its tasks when it is asked to: ``python -m tests.chaos.counted FILE ARGUMENT ...``.

At SIGUSR1 it writes a JSON object to FILE: how many tasks its event loop has, how many objects the garbage collector
follows, how many layers are loaded, how many stages serve, and how many threads are of the event loop's own pool, which
grows to its limit as it is used. Whoever asks sees a new file appear.
"""

import asyncio
import contextlib
import gc
import json
import os
import signal
import sys
import threading
from pathlib import Path

from flowspec_edge.cli.main import main
from flowspec_edge.engine.stage_runner import StageRunner


def count(path: Path) -> None:
    tasks: set[asyncio.Task[object]] = set()
    with contextlib.suppress(RuntimeError):  # the loop does not run yet, or any more
        tasks = asyncio.all_tasks()
    objects = gc.get_objects()
    runners = [found for found in objects if isinstance(found, StageRunner) and hasattr(found, "_blocks")]
    layers = [runner._num_layers for runner in runners if runner._blocks]
    counts = {"num_tasks": len(tasks), "num_objects": len(objects), "num_layers": sum(layers)}
    counts["num_stages"] = sum(task.get_name().startswith("stage behind ") for task in tasks)
    counts["num_pooled"] = sum(thread.name.startswith("asyncio_") for thread in threading.enumerate())
    part = path.with_suffix(".part")
    part.write_text(json.dumps(counts))
    os.replace(part, path)


if __name__ == "__main__":
    told_to = Path(sys.argv[1])
    signal.signal(signal.SIGUSR1, lambda *_: count(told_to))
    sys.exit(main(sys.argv[2:]))
