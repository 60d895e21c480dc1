"""What a stage takes goes back to the system, not only to the C library, and sessions take pages as they use them.

Each case runs in a process of its own, whose memory is read from Linux.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flowspec_edge.bundle import DEMO_BUNDLE
from flowspec_edge.engine.graphs import load_graph

START = """
import json, sys, threading
from pathlib import Path
import numpy as np
from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.engine.kv_cache import KvCache
from flowspec_edge.engine.timing import StageUnderTest
from flowspec_edge.core.speculation.drafting import DraftShape
from flowspec_edge.origin.engine import OriginEngine

bundle = Bundle.load(DEMO_BUNDLE)

def taken():  # MB of memory of its own
    text = open("/proc/self/status").read()
    return int(text.partition("RssAnon:")[2].split()[0]) / 1024

def on_a_thread(work):  # as nodes do: other threads have other heaps
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
"""
STAGES = """
def serve():
    global stage
    stage = StageUnderTest(bundle.directory, bundle.manifest, 0, 8, 1)

figures = []
for _ in range(3):
    on_a_thread(serve)
    loaded = taken()
    on_a_thread(stage.close)
    figures.append((loaded, taken()))
print(json.dumps(figures))
"""
ENGINES = """
def serve():
    global engine
    engine = OriginEngine(bundle, 1, DraftShape())

figures = []
for _ in range(3):
    on_a_thread(serve)
    loaded = taken()
    on_a_thread(engine.close)
    figures.append((loaded, taken()))
print(json.dumps(figures))
"""
PROMPT = """
from flowspec_edge.allocator import give_back_freed

def read():
    stage = StageUnderTest(bundle.directory, bundle.manifest, 0, 8, 1)
    figures = []
    for num_rows in (256, 256):
        stage.time_ms(num_rows, 0)
        kept = taken()
        give_back_freed()
        figures.append(kept - taken())
    print(json.dumps(figures))

on_a_thread(read)
"""
CACHE = """
before = taken()
cache = KvCache(8, 2, 64)
figures = []
for num_slots in (1, 128, 129, 1000):
    cache.reach(num_slots)
    figures.append((cache.num_slots, cache.num_bytes / 2**20, taken() - before))
print(json.dumps(figures))
del cache
"""


def figures_of(code: str) -> Any:
    root = Path(__file__).parents[2]
    run = [sys.executable, "-c", START + code]
    return json.loads(subprocess.run(run, check=True, stdout=subprocess.PIPE, cwd=root).stdout)


@pytest.mark.parametrize("code", [STAGES, ENGINES], ids=["stage", "engine"])
def test_what_was_loaded_goes_back_to_the_system(code: str) -> None:
    (_, idle), *later = figures_of(code)  # what the first one leaves are libraries
    for loaded, closed in later:
        assert closed - idle < 0.1 * (loaded - idle) + 2, later  # Python itself takes a MB more or less


def test_what_a_prompts_rows_took_goes_back_to_the_system() -> None:
    assert max(figures_of(PROMPT)) < 1.5  # MB that were still to be given back


def test_a_session_of_the_runtime_keeps_neither_rows_nor_a_plan_for_each_number_of_them() -> None:
    options = load_graph(DEMO_BUNDLE / "final_norm.onnx", num_threads=1).get_session_options()
    assert not options.enable_cpu_mem_arena and not options.enable_mem_pattern


def test_a_session_takes_memory_as_it_grows() -> None:
    figures = figures_of(CACHE)
    assert [num_slots for num_slots, _, _ in figures] == [128, 128, 256, 1024]
    for num_slots, size, used in figures:
        assert size == num_slots * 8 * 2 * (64 + 65) * 4 / 2**20
        assert used < size + 1.5, "what it outgrew is given back"
