"""Draft heads that come along: the one for this very model is found and joined, and no token depends on it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf", reason="GGUF files need gguf: pip install '.[gguf]'")

from safetensors.numpy import load_file, save_file

from exporter.__main__ import main
from exporter.bundle import ExportOptions, export_bundle
from exporter.gguf.model import open_gguf
from exporter.known_heads import HEADS, find_known_head
from exporter.target_digest import target_field
from flowspec_edge.bench.compare import Bench, Task
from flowspec_edge.bench.testbed import load_testbed
from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.engine.unsplit import UnsplitModel
from flowspec_edge.errors import CheckpointError
from flowspec_edge.manifest import load_manifest
from tests.bundles import MadeOnce
from tests.exporter.gguf.conftest import write_gguf
from tests.exporter.gguf.demo_model import DEMO_MODEL, write_demo_gguf
from tests.exporter.gguf.models import SHAPE, VOCAB, fields, random_tensors
from tests.narrowing import present
from tests.ring.conftest import answer_of, ring_of, tokens_of

MAX_HEAD_BYTES = 12_000_000
DRAFTED = 300


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.gguf"
    return write_gguf(path, fields(SHAPE, 2), random_tensors(SHAPE, ["Q4_0", "Q4_1"]))


@pytest.fixture
def heads(model: Path, tmp_path: Path) -> Path:
    """Heads for two models of the same sizes, of which the second one is ``model``."""
    own = target_field(open_gguf(model), "small")
    save_head(tmp_path / "heads/a", {"target": {**own["target"], "digest": "0" * 64}})
    save_head(tmp_path / "heads/b", own)
    (tmp_path / "heads/README.md").write_text("what they are")
    return tmp_path / "heads"


def save_head(directory: Path, named: dict[str, object]) -> None:
    """A head of random weights as ``flowspec-train-head`` writes one, which drafts a part of the vocabulary."""
    directory.mkdir(parents=True)
    hidden, inner, kv_size = SHAPE.hidden_size, 64, SHAPE.num_kv_heads * SHAPE.head_dim
    sizes = {
        **{"fc.weight": (hidden, 2 * hidden), "fc.bias": (hidden,)},
        **{f"layers.0.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qo"},
        **{f"layers.0.self_attn.{name}_proj.weight": (kv_size, hidden) for name in "kv"},
        **{f"layers.0.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")},
        **{"layers.0.mlp.down_proj.weight": (hidden, inner), "layers.0.post_attention_layernorm.weight": (hidden,)},
    }
    random = np.random.default_rng(4)
    tensors = {name: random.normal(0, 0.1, size).astype(np.float16) for name, size in sizes.items()}
    drafted = np.sort(random.permutation(VOCAB)[:DRAFTED])
    save_file({**tensors, "d2t": drafted - np.arange(DRAFTED)}, directory / "model.safetensors")
    config = {
        **{"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": SHAPE.num_heads},
        **{"num_key_value_heads": SHAPE.num_kv_heads, "head_dim": SHAPE.head_dim, "rms_norm_eps": 1e-5},
        **{"vocab_size": VOCAB, "draft_vocab_size": DRAFTED, "max_position_embeddings": SHAPE.max_context, **named},
    }
    (directory / "config.json").write_text(json.dumps(config))


def test_the_head_of_a_model_is_found_by_its_digest(model: Path, heads: Path, tmp_path: Path) -> None:
    source = open_gguf(model)
    assert find_known_head(source, heads) == heads / "b"
    shutil.rmtree(heads / "b")
    assert find_known_head(source, heads) is None
    assert find_known_head(source, tmp_path / "none") is None


@pytest.mark.slow
def test_it_is_joined_unless_there_shall_be_none(model: Path, heads: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    options = {"checkpoint": model, "drafter": None, "out": tmp_path / "out"}
    manifest = export_bundle(ExportOptions(**options, heads=heads), lines.append)  # type: ignore[arg-type]
    assert present(manifest.drafter).kind == "eagle1" and present(present(manifest.drafter).top).num_bytes > 0
    said = "note: drafts by b, a head that comes along; flowspec-export --drafter none leaves it out"
    assert lines.count(said) == 1
    assert "torch" not in manifest.made_with
    for found in (None, heads / "a"):
        options["out"] = tmp_path / f"without {found is None}"
        assert export_bundle(ExportOptions(**options, heads=found)).drafter is None  # type: ignore[arg-type]


@pytest.mark.slow
def test_no_torch_is_needed(model: Path, heads: Path, tmp_path: Path) -> None:
    """As on boards."""
    code = """
import sys
sys.modules.update(dict.fromkeys(("torch", "transformers", "optimum")))
from pathlib import Path
from exporter.bundle import ExportOptions, export_bundle
checkpoint, heads, out = map(Path, sys.argv[1:])
assert export_bundle(ExportOptions(checkpoint=checkpoint, drafter=None, heads=heads, out=out)).drafter is not None
"""
    subprocess.run([sys.executable, "-c", code, model, heads, tmp_path / "out"], check=True)


DAMAGE: dict[str, Callable[[Path], object]] = {
    r"b/model.safetensors: 3000 bytes, not readable": lambda head: shorten(head / "model.safetensors", 3000),
    r"b: no model.safetensors": lambda head: (head / "model.safetensors").unlink(),
    r"b/config.json: not readable as JSON": lambda head: shorten(head / "config.json", 40),
    r"b: tensor fc.weight is missing": lambda head: without(head / "model.safetensors", "fc.weight"),
}


def shorten(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def without(path: Path, name: str) -> None:
    save_file({key: tensor for key, tensor in load_file(path).items() if key != name}, path)


@pytest.mark.parametrize("problem", DAMAGE)
def test_a_damaged_head_says_what_to_do(model: Path, heads: Path, tmp_path: Path, problem: str) -> None:
    DAMAGE[problem](heads / "b")
    with pytest.raises(CheckpointError, match=rf"{problem}.*install flowspec-edge again, or .*--drafter none"):
        export_bundle(ExportOptions(checkpoint=model, drafter=None, heads=heads, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def demo(made_once: MadeOnce) -> Bundle:
    """The demo model as a GGUF file, with its head as one that comes along."""

    def export(root: Path) -> None:
        model = write_demo_gguf(root / "demo.gguf")
        shutil.copytree(DEMO_MODEL.parent / "eagle", root / "heads/demo")
        path = root / "heads/demo/config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **target_field(open_gguf(model), "demo")}))
        export_bundle(ExportOptions(checkpoint=model, drafter=None, heads=root / "heads", out=root / "out"))

    return Bundle.load(made_once("demo with a head that comes along", export) / "out")


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.7])
async def test_the_text_is_that_without_drafts(demo: Bundle, temperature: float) -> None:
    assert demo.manifest.precision == "own"
    unsplit = UnsplitModel(demo.directory, demo.manifest)
    prompt = Tokenizer(demo.directory / demo.manifest.tokenizer.file).encode("def main(argv):\n")
    options = GenerateOptions(max_new_tokens=48, temperature=temperature, seed=3)
    expected = list(unsplit.generate(prompt, options))
    async with ring_of(3, demo) as ring:
        assert tokens_of(await answer_of(ring, prompt, options)) == expected
        assert ring._engine.drafter is not None


@pytest.mark.slow
def test_its_drafts_are_worth_something(demo: Bundle) -> None:
    """On the virtual clock, for a ring may find that drafts do not pay on the machine that tests it."""
    bench, options = Bench(demo), GenerateOptions(max_new_tokens=48)
    tape = bench.record(Task(prompt_set="functions", seed=0, temperature=0, text="def main(argv):\n"), options)
    statistics = bench.play(load_testbed("mixed"), tape, options).statistics
    assert statistics.num_tokens / statistics.num_verifications > 1.5


@pytest.mark.slow
def test_the_command_does_without_one(model: Path, tmp_path: Path) -> None:
    command = [str(model), "--out", str(tmp_path / "out"), "--drafter", "none"]
    assert main(command) == 0
    assert load_manifest(tmp_path / "out").drafter is None


@pytest.mark.parametrize("config", sorted(HEADS.glob("*/config.json")), ids=lambda path: path.parent.name)
def test_what_comes_along_is_whole_and_small(config: Path) -> None:
    directory = config.parent
    assert {path.name for path in directory.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    target = json.loads(config.read_text())["target"]
    assert len(target["digest"]) == 64 and target["name"]
    path = directory / "model.safetensors"
    assert path.stat().st_size < MAX_HEAD_BYTES
    assert {tensor.dtype.name for tensor in load_file(path).values()} <= {"float16", "int64", "int32"}
    text = (directory / "README.md").read_text()
    assert "licence" in text.lower() and target["name"].split("-")[0].lower() in text.lower()
