"""What is exported computes what transformers computes, family by family."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="exporting needs torch: pip install '.[export]'")

import itertools

import torch
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedModel

from exporter import assembly as exporting
from exporter import onnx_file
from exporter.__main__ import main
from exporter.bundle import ExportOptions, export_bundle
from exporter.config import LayerShape
from exporter.layer_graph import Product, Weights, write_block
from exporter.matrices import FloatMatrix, PerTokenMatrix, SplitMatrix
from exporter.source import Report
from flowspec_edge.bundle import DEMO_BUNDLE
from flowspec_edge.core.rows import Row
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.errors import CheckpointError, ParityError
from flowspec_edge.manifest import Manifest, load_manifest, verify_digests
from tests.engine.conftest import Session, make_chain
from tests.exporter.checkpoints import FAMILIES, edit_config, save_checkpoint, save_eagle, save_sentencepiece
from tests.narrowing import instance, present

pytestmark = pytest.mark.slow

PARENTS = [-1, -1, 0, 0, 1, 3]  # of a small tree, counted from its first row; -1 is the chain's last


def export(tmp_path: Path, drafter: Path | None = None, report: Report = lambda line: None, **options: Any) -> Manifest:
    return export_bundle(
        ExportOptions(checkpoint=tmp_path / "target", drafter=drafter, out=tmp_path / "out", **options), report
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_chain_is_transformers_model(tmp_path: Path, family: str) -> None:
    FAMILIES[family](tmp_path / "target")
    block_size = 2 if family == "Qwen3" else 1
    manifest = export(tmp_path, precision="fp32", block_size=block_size, allow_pickle="Vicuna" in family)
    verify_digests(tmp_path / "out", manifest.files())
    assert [block.start for block in manifest.blocks] == list(range(0, 3, block_size))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "target").eval()
    cuts = [block.start for block in manifest.blocks[1:]]
    _compare_chain(model, tmp_path / "out", manifest, [[0, *some, 3] for some in _subsets(cuts)])


def _subsets(cuts: Sequence[int]) -> Iterable[tuple[int, ...]]:
    return itertools.chain.from_iterable(itertools.combinations(cuts, number) for number in range(len(cuts) + 1))


def _compare_chain(
    model: PreTrainedModel,
    directory: Path,
    manifest: Manifest,
    splits: Sequence[list[int]],
) -> None:
    """Prefill in two chunks, a tree, and the last row of it by itself, in each split of the layers."""
    tokens = np.random.default_rng(0).integers(2, 2048, 40).tolist()
    chain = make_chain(tokens[:20])
    tree = [Row(20 + i, 20 + parent, tokens[20 + i]) for i, parent in enumerate(PARENTS)]
    expected = [*_logits(model, tokens[:20])]
    for place in range(len(tree)):
        path, parent = [], place
        while parent >= 0:
            path.append(tokens[20 + parent])
            parent = PARENTS[parent]
        expected.append(_logits(model, tokens[:20] + path[::-1])[-1])
    head = Head(directory, manifest)
    for bounds in splits:
        session = Session(*(StageRunner(directory, manifest, a, b) for a, b in itertools.pairwise(bounds)))
        found = [head.logits(session.run(rows)) for rows in (chain[:13], chain[13:], tree[:5], tree[5:])]
        np.testing.assert_allclose(np.concatenate(found), np.stack(expected), atol=2e-4)


def _logits(model: PreTrainedModel, tokens: Sequence[int]) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([tokens])).logits[0].numpy()
    return logits


HEADS: dict[str, dict[str, Any]] = {
    "without a bias, pickled": {"has_bias": False, "pickled": True},
    "for Qwen2": {"qkv_bias": True, "architectures": ["Qwen2ForCausalLM"]},
}


@pytest.mark.parametrize("head", HEADS)
def test_an_eagle_head_is_exported_and_compared(tmp_path: Path, head: str) -> None:
    save_checkpoint(tmp_path / "target")
    save_eagle(tmp_path / "eagle", **HEADS[head])
    manifest = export(tmp_path, drafter=tmp_path / "eagle", precision="fp32", allow_pickle="pickled" in head)
    assert present(manifest.drafter).kind == "eagle1"
    assert 0 < present(manifest.parity.drafter_error) < 1e-4


@pytest.mark.parametrize("source", ["file", "list", "config"])
def test_the_chat_template_and_special_tokens_are_carried_over(tmp_path: Path, source: str) -> None:
    target = tmp_path / "target"
    save_checkpoint(target)
    template = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
    config: dict[str, dict[str, Any]] = {
        "file": {"chat_template": "older", "eos_token": "<|endoftext|>"},
        "list": {"chat_template": named},
        "config": {"chat_template": template},
    }
    (target / "tokenizer_config.json").write_text(json.dumps(config[source]))
    if source == "file":
        (target / "chat_template.jinja").write_text(template)
    (target / "generation_config.json").write_text(json.dumps({"bos_token_id": 3, "eos_token_id": [5, 7]}))
    reported: list[str] = []
    manifest = export(tmp_path, report=reported.append, precision="fp32", block_size=3)
    assert load_manifest(tmp_path / "out") == manifest
    assert (manifest.chat_template, manifest.bos_token_id, manifest.eos_token_ids) == (template, 3, [5, 7])
    assert any(line.startswith("note: EOS is 5, 7 in config.json") for line in reported) == (source == "file")


def test_a_tokenizer_that_is_a_sentencepiece_model_alone_is_converted(tmp_path: Path) -> None:
    """As in Vicuna's directories."""
    target = tmp_path / "target"
    save_checkpoint(target)
    reference = save_sentencepiece(target)
    manifest = export(tmp_path, precision="fp32", block_size=3)
    tokenizer = Tokenizer(tmp_path / "out" / manifest.tokenizer.file)
    for text in ("Every stage of the ring", "def f(x):\n    return  x\t# twice", "précis ✓ 語"):
        assert tokenizer.encode(text) == [reference.bos_id(), *reference.encode(text)]
        assert tokenizer.decode(reference.encode(text)) == text


def test_a_window_that_no_text_is_longer_than_leaves_the_graphs_as_they_are(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "target", MistralConfig, sliding_window=40)
    options: dict[str, Any] = {"precision": "fp32", "max_context": 40, "block_size": 3, "force": True}
    windowed = export(tmp_path, **options)
    assert (windowed.geometry.max_context, windowed.geometry.window) == (40, None)
    edit_config(tmp_path / "target", sliding_window=None)
    assert export(tmp_path, **options).blocks == windowed.blocks


def test_int8_files_are_a_quarter_and_agree_with_their_weights(tmp_path: Path) -> None:
    save_checkpoint(
        tmp_path / "target", hidden_size=256, intermediate_size=500, head_dim=64
    )  # 500: a block of 20 at the end
    int8 = export(tmp_path, precision="int8")
    shutil.rmtree(tmp_path / "out")
    fp32 = export(tmp_path, precision="fp32")
    assert int8.blocks[0].num_bytes < 0.3 * fp32.blocks[0].num_bytes
    assert int8.blocks[0].memory_bytes == fp32.blocks[0].memory_bytes
    assert int8.parity.chain_error < 1e-4


def test_the_demo_bundle_is_what_its_checkpoint_gives(demo_export: Callable[[str], Path]) -> None:
    shipped = load_manifest(DEMO_BUNDLE)
    verify_digests(DEMO_BUNDLE, shipped.files())
    directory = demo_export(shipped.precision)
    fresh = load_manifest(directory)
    if [entry.sha256 for entry in fresh.files()] == [entry.sha256 for entry in shipped.files()]:
        return
    # Another processor or torch may write other bytes; the rows must be the same.
    chain = make_chain(range(2, 66))
    rows = [Session(StageRunner(d, m, 0, 8)).run(chain) for d, m in ((directory, fresh), (DEMO_BUNDLE, shipped))]
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "w8a8"])
def test_a_block_that_differs_is_named_and_nothing_written(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "target")

    def write_wrong(
        shape: LayerShape, start: int, stop: int, weights: Weights, path: Path, shown: Path | None
    ) -> dict[str, Product]:
        name = "layers.0.mlp.down_proj.weight"
        if start == 1:
            kind: type[FloatMatrix | SplitMatrix] = FloatMatrix if precision == "fp32" else SplitMatrix
            wrong = 1.01 * instance(weights[name], kind).unpacked()
            weights = {**weights, name: FloatMatrix(wrong) if kind is FloatMatrix else PerTokenMatrix.rounded(wrong)}
        return write_block(shape, start, stop, weights, path, shown)

    monkeypatch.setattr(exporting, "write_block", write_wrong)
    with pytest.raises(ParityError, match=r"layers-001-002\.onnx: layers \[1, 2\): error .* exceeds the tolerance"):
        export(tmp_path, precision=precision)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(tmp_path / "target")
    arguments = [str(tmp_path / "target"), "--out", str(tmp_path / "out"), "--json"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["parity"]["chain_error"] < 1e-3
    assert "layers [0, 1) of 3, w8a8: error" in err
    assert main(arguments) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("flowspec-export: ")
    assert main([str(tmp_path / "nothing"), "--out", str(tmp_path / "other"), "--json"]) == 1
    out, err = capsys.readouterr()
    assert "no such directory or file, and no name on the hub" in err
    assert json.loads(out)["error"]["type"] == "CheckpointError"


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_an_export_that_is_ended_leaves_nothing(
    ending: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def end(*arguments: object) -> None:
        assert len(list(tmp_path.iterdir())) == 2, "the checkpoint, and what is half written"
        signal.raise_signal(ending)

    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(exporting.Assembly, "assemble", end)
    save_checkpoint(tmp_path / "target")
    try:
        assert main([str(tmp_path / "target"), "--out", str(tmp_path / "out")]) == 130
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert "interrupted, nothing was written" in capsys.readouterr().err


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; sys.argv[1:] = ['--help']\n"
        "try:\n import runpy; runpy.run_module('exporter', run_name='__main__')\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "usage: flowspec-export" in found
    assert found.splitlines()[-1] == "False"


def test_a_file_that_would_be_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "target")
    monkeypatch.setattr(onnx_file, "MAX_FILE_BYTES", 50_000)
    with pytest.raises(
        CheckpointError, match=r"layers-000-003\.onnx: \d+ bytes of weights exceed the 50000-byte limit"
    ):
        export(tmp_path, precision="fp32", block_size=3)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
