"""Bundles made of GGUF files: the weights are the file's, graphs are those of checkpoints, and rows keep their bits."""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from onnx import numpy_helper

from exporter.bundle import ExportOptions, export_bundle
from exporter.gguf.config import gguf_name
from exporter.gguf.file import GgufFile
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.errors import BundleError, CheckpointError
from flowspec_edge.manifest import Manifest, load_manifest, verify_digests
from tests.arm import row_bits
from tests.bundles import MadeOnce
from tests.exporter.gguf.conftest import Rows, stored_rows, write_gguf
from tests.exporter.gguf.models import SHAPE, VOCAB, fields, random_tensors

pytestmark = pytest.mark.slow

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "Q4_K Q6_K")


@pytest.fixture(scope="module")
def made(made_once: MadeOnce) -> Path:
    """A file with a layer of each type, and the bundle made of it."""
    return made_once("gguf", make_bundle)


def make_bundle(root: Path) -> None:
    write_gguf(root / "mixed.gguf", fields(SHAPE, len(TYPES)), random_tensors(SHAPE, TYPES))
    export_bundle(ExportOptions(checkpoint=root / "mixed.gguf", drafter=None, out=root / "out"))


@pytest.fixture(scope="module")
def manifest(made: Path) -> Manifest:
    return load_manifest(made / "out")


def test_a_bundle_has_its_own_precision_and_what_the_file_says(made: Path, manifest: Manifest) -> None:
    verify_digests(made / "out", manifest.files())
    assert (manifest.name, manifest.precision, manifest.architecture) == ("mixed", "own", "LlamaForCausalLM")
    assert (manifest.bos_token_id, manifest.eos_token_ids) == (0, [1])
    assert manifest.geometry.vocab_size == VOCAB and len(manifest.blocks) == len(TYPES)
    assert max(manifest.parity.block_errors) < 1e-4 and manifest.parity.head_error < 1e-4
    assert manifest.parity.chain_error < 1e-4, "the graphs that are compared and those that are shipped are the same"


@pytest.mark.parametrize("kind", TYPES)
def test_weights_in_the_graphs_are_the_files(kind: str, made: Path, manifest: Manifest) -> None:
    layer = TYPES.index(kind)
    tensors = GgufFile.open(made / "mixed.gguf").tensors
    found = weights_of(made / "out" / manifest.blocks[layer].file)
    kept = {name: found.pop(f"{name}/kept") for name in list(found) if f"{name}/kept" in found}
    assert len(found) == 7 and len(kept) == (0 if kind in ("F32", "F16", "BF16") else 5)
    for name, weights in found.items():
        tensor = tensors[gguf_name(f"model.layers.{layer}.{name}.weight")]
        expected = dequantize(tensor.read(), GGMLQuantizationType[tensor.type]).reshape(tensor.shape)
        if "q_proj" in name or "k_proj" in name:
            heads = expected.reshape(-1, SHAPE.head_dim // 2, 2, tensor.shape[1])
            expected = heads.swapaxes(1, 2).reshape(tensor.shape)
        if tensor.type in ("Q4_1", "Q5_1", "Q4_K", "Q5_K"):  # offsets are those of the middle level there
            np.testing.assert_allclose(weights, expected, rtol=0, atol=4e-7 * np.abs(expected).max())
        else:
            np.testing.assert_array_equal(weights, expected)
        for column in kept[name].T if name in kept else ():
            assert (column[:, None] == expected).all(axis=0).any(), "in float32, a column is the file's own"


def weights_of(path: Path) -> dict[str, np.ndarray]:
    """The matrices of a block of one layer, [num_out, num_in], read from the file as any reader would."""
    graph = onnx.load(path).graph
    arrays = {tensor.name: tensor for tensor in graph.initializer}
    found: dict[str, np.ndarray] = {}
    for node in graph.node:
        named = [name for name in node.input if name.endswith(("/levels", "/weights"))]
        if not named:
            continue
        name = named[0].removeprefix("/layers.0/").rpartition("/")[0]
        if node.op_type == "MatMulNBits":
            attributes = {attribute.name: attribute.i for attribute in node.attribute}
            levels, scales = (numpy_helper.to_array(arrays[given]) for given in node.input[1:])
            if attributes["bits"] == 4:
                levels = np.stack([levels & 15, levels >> 4], axis=-1).reshape(*levels.shape[:2], -1)
            weights = scales[..., None] * (levels.astype(np.float32) - 2 ** (attributes["bits"] - 1))
            if (offsets := f"/layers.0/{name}/offsets") in arrays:
                weights += numpy_helper.to_array(arrays[offsets]).T[..., None]
            found[name] = weights.reshape(attributes["N"], attributes["K"])
        else:
            found[name] = numpy_helper.to_array(arrays[named[0]]).astype(np.float32).T
    return found


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_row_has_the_same_bits_in_every_tree(
    num_threads: int, made: Path, manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    stage = StageRunner(made / "out", manifest, 0, len(TYPES), num_threads=num_threads)
    assert not caplog.records, "no row has to run by itself"
    found = [row_bits.compare(stage, VOCAB, seed, num_prompt=200) for seed in range(3)]
    compared, differing = (sum(numbers) for numbers in zip(*found, strict=True))
    assert compared > 300 and not differing


def test_a_heads_rows_have_the_same_bits_in_every_chunk(made: Path, manifest: Manifest) -> None:
    head = Head(made / "out", manifest)
    rows = np.random.default_rng(4).standard_normal((16, SHAPE.hidden_size), np.float32)
    np.testing.assert_array_equal(np.concatenate([head.logits(row[None]) for row in rows]), head.logits(rows))


BLOCKED = """
import sys
NAMES = "torch", "transformers", "optimum", "huggingface_hub", "sentencepiece"
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in NAMES:
            raise ImportError(f"{name} was imported", name=name)
sys.meta_path.insert(0, Refuse())
from exporter.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_no_torch_is_needed(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "small.gguf", fields(SHAPE, 1), random_tensors(SHAPE, ["Q4_0"]))
    command = [sys.executable, "-c", BLOCKED, str(path), "--out", str(tmp_path / "out"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["precision"] == "own"
    assert set(load_manifest(tmp_path / "out").made_with) <= {"flowspec-edge", "onnx", "onnxruntime", "gguf"}
    assert "matrices as the file has them: Q4_0 7, Q6_K 1, Q8_0 1" in done.stderr
    assert "levels of Q6_K are kept in 8 bits" in done.stderr


def test_other_precisions_are_made_of_the_files_weights(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "small.gguf", fields(SHAPE, 1), random_tensors(SHAPE, ["Q4_K"]))
    (tmp_path / "prose.txt").write_text("It was the best of times, it was the worst of times.\n" * 9)
    options: dict[str, Any] = {"precision": "w8a8", "also": ("own", "fp32"), "eval_text": tmp_path / "prose.txt"}
    manifest = export_bundle(ExportOptions(checkpoint=path, drafter=None, out=tmp_path / "out", **options))
    assert manifest.precisions == ("w8a8", "own", "fp32")
    agreement = {quality.precision: quality.max_error for quality in manifest.quality}
    assert agreement["fp32"] < 1e-4 < agreement["own"] < 0.3


def without(name: str) -> Callable[[Rows], None]:
    return lambda tensors: tensors.pop(name) and None


def put(name: str, kind: str, rows: np.ndarray) -> Callable[[Rows], None]:
    return lambda tensors: tensors.update({name: (kind, rows)})


ZEROS = np.zeros((256, 512), np.float32)
REFUSED: dict[str, tuple[Callable[[Rows], None], str]] = {
    "missing": (without("blk.0.ffn_up.weight"), r"tensor blk.0.ffn_up.weight is missing, expected shape \[512, 256\]"),
    "norm missing": (without("output_norm.weight"), r"tensor output_norm.weight is missing, expected shape \[256\]"),
    "no embedding": (without("token_embd.weight"), "tensor token_embd.weight is missing"),
    "shape": (
        put("blk.0.attn_q.weight", "F32", ZEROS),
        r"tensor blk.0.attn_q.weight has shape \[256, 512\], expected \[256, 256\] from its metadata",
    ),
    "type": (
        put("blk.0.attn_v.weight", "Q2_K", stored_rows("Q2_K", 128, 256)),
        "tensor blk.0.attn_v.weight is of type Q2_K, which is not supported; supported: F32, .*, Q6_K",
    ),
    "no place": (
        put("blk.0.attn_sinks.weight", "F32", ZEROS),
        "tensor blk.0.attn_sinks.weight has no place in the model",
    ),
    "layer beyond": (put("blk.1.attn_q.weight", "F32", ZEROS), "tensor blk.1.attn_q.weight has no place in the model"),
    "rope factors": (
        put("rope_freqs.weight", "F32", np.ones(7, np.float32)),
        r"tensor rope_freqs.weight has shape \[7\], expected \[32\]",
    ),
    "senseless rope factors": (
        put("rope_freqs.weight", "F32", np.zeros(32, np.float32)),
        "tensor rope_freqs.weight has factors that are not positive",
    ),
}


@pytest.mark.parametrize("problem", REFUSED)
def test_files_with_other_tensors_are_refused_by_name(problem: str, tmp_path: Path) -> None:
    change, message = REFUSED[problem]
    tensors = random_tensors(SHAPE, ["Q8_0"])
    change(tensors)
    refuse(tmp_path, message, fields(SHAPE, 1), tensors)


def refuse(tmp_path: Path, message: str, values: dict[str, Any], tensors: Rows, architecture: str = "llama") -> None:
    """The export names the file and what is wrong with it, and writes nothing."""
    path = write_gguf(tmp_path / "bad.gguf", values, tensors, architecture)
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}: {message}"):
        export_bundle(ExportOptions(checkpoint=path, drafter=None, out=tmp_path / "out"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.gguf"]


@pytest.mark.parametrize("architecture", ["gemma4", "cohere2", "deepseek2"])
def test_other_architectures_are_refused_by_name(architecture: str, tmp_path: Path) -> None:
    values = fields(SHAPE, 1, architecture)
    message = f"architecture '{architecture}' is not supported; supported: llama, qwen2, qwen3"
    refuse(tmp_path, message, values, random_tensors(SHAPE, ["Q8_0"]), architecture)


def test_a_file_without_tokenizer_is_refused(tmp_path: Path) -> None:
    values = {name: value for name, value in fields(SHAPE, 1).items() if not name.startswith("tokenizer.")}
    refuse(tmp_path, "tokenizer.ggml.model is missing", values, random_tensors(SHAPE, ["Q8_0"]))


def test_a_tokenizer_for_more_tokens_than_the_model_has_is_refused(tmp_path: Path) -> None:
    tensors = random_tensors(SHAPE, ["Q8_0"], head=None)
    kind, rows = tensors["token_embd.weight"]
    tensors["token_embd.weight"] = kind, rows[:100]
    refuse(tmp_path, r"token \d+ is outside the model's vocabulary of 100", fields(SHAPE, 1), tensors)


def test_too_little_room_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "small.gguf", fields(SHAPE, 2), random_tensors(SHAPE, ["Q4_K", "Q5_1"]))
    options = ExportOptions(checkpoint=path, drafter=None, out=tmp_path / "out")
    needed = sum(entry.num_bytes for entry in export_bundle(options).files())
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(0.9 * needed)))
    with pytest.raises(BundleError, match=r"out: the bundle takes about \d+ MB, and \d+ MB are free on that disk"):
        export_bundle(options)
    assert [entry.name for entry in tmp_path.iterdir()] == ["small.gguf"]


FULL = """
import resource, sys
from exporter.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("limit", [100_000, 1_000_000])
def test_a_write_that_fails_leaves_nothing(limit: int, tmp_path: Path) -> None:
    """As on a full disk, which comes while the tokenizer, and while the embedding, is written."""
    path = write_gguf(tmp_path / "small.gguf", fields(SHAPE, 1), random_tensors(SHAPE, ["Q4_0"]))
    command = [sys.executable, "-c", FULL, str(limit), str(path), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"flowspec-export: {tmp_path}/out: could not be written (File too large)"
    assert [entry.name for entry in tmp_path.iterdir()] == ["small.gguf"]


GROWN = """
import re, sys
from pathlib import Path
from exporter.__main__ import main
assert main(sys.argv[1:]) == 0
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def test_layers_are_in_memory_one_by_one(tmp_path: Path) -> None:
    """A file of more layers takes no more memory: here a layer has 12 MB of weights in float32."""
    shape = replace(SHAPE, hidden_size=512, intermediate_size=1536, num_heads=8)
    one = random_tensors(shape, ["F32"], head=None)
    peaks = []
    for num_layers in (1, 6):
        tensors = {name: one[re.sub(r"^blk\.\d+", "blk.0", name)] for name in names_of(one, num_layers)}
        path = write_gguf(tmp_path / f"{num_layers}.gguf", fields(shape, num_layers), tensors)
        command = [sys.executable, "-c", GROWN, str(path), "--out", str(tmp_path / f"out-{num_layers}")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) * 1024)
    layer_bytes = sum(4 * math.prod(size) for size in shape.tensor_shapes().values())
    assert layer_bytes > 11e6
    assert peaks[1] < peaks[0] + 2 * layer_bytes
    assert peaks[1] < 2 * layer_bytes + 500e6


def names_of(one: Rows, num_layers: int) -> list[str]:
    """The names of a model of more layers."""
    in_layers = [name.removeprefix("blk.0") for name in one if name.startswith("blk.0")]
    others = [name for name in one if not name.startswith("blk.0")]
    return others + [f"blk.{layer}{name}" for layer in range(num_layers) for name in in_layers]
