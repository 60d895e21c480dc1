"""The memory that loading and serving a stage takes, measured in processes of their own.

It is read as VmHWM, because Linux counts the peak of the parent process in the maxrss of getrusage as well.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from exporter.config import LayerShape
from exporter.layer_graph import Weights, loaded_bytes, write_block
from exporter.matrices import FloatMatrix
from exporter.precisions import OWN, PRECISIONS
from flowspec_edge.bundle import DEMO_BUNDLE
from flowspec_edge.manifest import BlockEntry, FileEntry, describe_file, load_manifest
from tests.bundles import MadeOnce

pytestmark = pytest.mark.slow

NUM_LAYERS = 3
FORMS = tuple(name for name in PRECISIONS if name != OWN)
"""A file's own form is one of the others."""
SHAPE = LayerShape(
    hidden_size=1024,
    intermediate_size=3072,
    num_heads=16,
    num_kv_heads=8,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_frequencies=tuple(10000.0 ** -(i / 32) for i in range(32)),
    max_context=512,
)
MIB = 2**20
EMBEDDING_ROWS = 65536  # 256 MiB

MEASURE = """
import json, re, sys
from pathlib import Path
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.manifest import load_manifest

directory, precision = Path(sys.argv[1]), sys.argv[2]
manifest = load_manifest(directory)
stage = StageRunner(directory, manifest, 0, manifest.geometry.num_layers, precision=precision)
rows = stage._embedding.rows([5, 40000])
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
weights = sum(block.memory_bytes for block in manifest.blocks_of(0, manifest.geometry.num_layers, precision))
print(json.dumps({"peak": peak, "weights": weights, "rows": rows.shape}))
"""


@pytest.fixture(scope="module")
def directory(made_once: MadeOnce) -> Path:
    """Random layers of 48 MiB in float32, in several precisions, and a large embedding, most of it a hole in a file."""
    return made_once("memory", export_random_layers)


def export_random_layers(root: Path) -> None:
    (root / "blocks").mkdir()
    random = np.random.default_rng(0)
    layer: Weights = {
        f"layers.0.{name}": FloatMatrix(random.normal(0, 0.02, size).astype(np.float32))
        if len(size) == 2
        else np.ones(size, np.float32)
        for name, size in SHAPE.tensor_shapes().items()
    }
    blocks: dict[str, list[BlockEntry]] = {name: [] for name in FORMS}
    for name, entries in blocks.items():
        formed = {key: w if isinstance(w, np.ndarray) else PRECISIONS[name].form(w) for key, w in layer.items()}
        for start in range(NUM_LAYERS):
            path = root / f"blocks/{start}.{name}.onnx"
            memory_bytes = loaded_bytes(formed, write_block(SHAPE, start, start + 1, formed, path))
            file = describe_file(root, f"blocks/{path.name}")
            entries.append(BlockEntry(**file, start=start, stop=start + 1, memory_bytes=memory_bytes))
    np.lib.format.open_memmap(root / "embedding.npy", "w+", np.float32, (EMBEDDING_ROWS, SHAPE.hidden_size)).flush()
    demo = load_manifest(DEMO_BUNDLE)
    for entry in (demo.tokenizer, demo.final_norm, demo.head):
        (root / entry.file).write_bytes((DEMO_BUNDLE / entry.file).read_bytes())
    geometry = dataclasses.replace(
        demo.geometry,
        num_layers=NUM_LAYERS,
        hidden_size=SHAPE.hidden_size,
        num_heads=SHAPE.num_heads,
        num_kv_heads=SHAPE.num_kv_heads,
        head_dim=SHAPE.head_dim,
        vocab_size=EMBEDDING_ROWS,
        rope_frequencies=list(SHAPE.rope_frequencies),
    )
    own = blocks.pop("fp32")
    embedding = FileEntry(**describe_file(root, "embedding.npy"))
    manifest = dataclasses.replace(
        demo, precision="fp32", geometry=geometry, embedding=embedding, blocks=own, alternatives=blocks, drafter=None
    )
    manifest.write(root)


@pytest.mark.parametrize("precision", FORMS)
def test_loading_peaks_at_little_more_than_the_weights(directory: Path, precision: str) -> None:
    command = [sys.executable, "-c", MEASURE, str(directory), precision]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["rows"] == [2, SHAPE.hidden_size], "the embedding was read"
    assert found["weights"] > 19 * MIB
    limit = 1.25 * found["weights"] + 100e6
    assert found["peak"] <= limit, f"{found['peak'] / MIB:.0f} MiB, the limit is {limit / MIB:.0f} MiB"
