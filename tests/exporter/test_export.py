"""What is exported computes what transformers computes, and what cannot be exported is refused with one clear sentence."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="exporting needs torch: pip install '.[export]'")

import itertools

from exporter import bundle as exporting
from exporter.__main__ import main
from exporter.bundle import ExportOptions, export_bundle
from flowspec_edge.core.tree import Row
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.errors import BundleError, CheckpointError, ParityError
from flowspec_edge.manifest import load_manifest, verify_digests
from flowspec_edge.node import DEMO_BUNDLE
from tests.engine.conftest import Session, make_chain
from tests.exporter.checkpoints import DEMO_MODEL, save_checkpoint, save_eagle

pytestmark = pytest.mark.slow

LAYOUTS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "own head_dim": {"head_dim": 48},
    "one kv head": {"num_key_value_heads": 1, "rope_theta": 500.0},
    "shards": {"max_shard_size": "200KB"},
}
PARENTS = [-1, -1, 0, 0, 1, 3]  # of a small tree, counted from its first row; -1 is the chain's last


def export(tmp_path, drafter=None, **options):
    options = ExportOptions(checkpoint=tmp_path / "target", drafter=drafter, out=tmp_path / "out", **options)
    return export_bundle(options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_size", [1, 2])
def test_the_chain_is_transformers_model(tmp_path, layout, block_size):
    model = save_checkpoint(tmp_path / "target", **LAYOUTS[layout])
    manifest = export(tmp_path, precision="fp32", block_size=block_size)
    verify_digests(tmp_path / "out", manifest.files())
    bounds = [block.start for block in manifest.blocks] + [3]
    assert bounds == [*list(range(0, 3, block_size)), 3]
    stages = [StageRunner(tmp_path / "out", manifest, a, b) for a, b in itertools.pairwise(bounds)]
    head = Head(tmp_path / "out", manifest)
    tokens = np.random.default_rng(0).integers(2, 2048, 40).tolist()
    session = Session(*stages)
    chain = make_chain(tokens[:20])
    found = [head.logits(session.run(chain[:13])), head.logits(session.run(chain[13:]))]  # prefill in two chunks
    np.testing.assert_allclose(np.concatenate(found), _logits(model, tokens[:20]), atol=2e-4)
    tree = [Row(20 + i, 20 + parent, tokens[20 + i]) for i, parent in enumerate(PARENTS)]
    found = np.concatenate([head.logits(session.run(tree[:5])), head.logits(session.run(tree[5:]))])  # a one-row chunk
    for place in range(len(tree)):
        path, parent = [], place
        while parent >= 0:
            path.append(tokens[20 + parent])
            parent = PARENTS[parent]
        np.testing.assert_allclose(found[place], _logits(model, tokens[:20] + path[::-1])[-1], atol=2e-4)


def _logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


@pytest.mark.parametrize("has_bias", [True, False])
def test_an_eagle_head_is_exported_and_compared(tmp_path, has_bias):
    save_checkpoint(tmp_path / "target")
    save_eagle(tmp_path / "eagle", has_bias=has_bias)
    manifest = export(tmp_path, drafter=tmp_path / "eagle", precision="fp32")
    assert manifest.drafter.kind == "eagle1"
    assert 0 < manifest.parity.drafter_error < 1e-4


def test_int8_files_are_a_quarter_and_agree_with_their_weights(tmp_path):
    save_checkpoint(tmp_path / "target", hidden_size=256, intermediate_size=512, head_dim=64)
    int8 = export(tmp_path, precision="int8")
    shutil.rmtree(tmp_path / "out")
    fp32 = export(tmp_path, precision="fp32")
    tables = 2 * 32 * (96 + 1024) * 4  # rotary rows, the same in both
    assert int8.blocks[0].num_bytes - tables < 0.3 * (fp32.blocks[0].num_bytes - tables)
    assert int8.blocks[0].memory_bytes == fp32.blocks[0].memory_bytes
    assert int8.parity.chain_error < 1e-4


def test_the_demo_bundle_is_what_its_checkpoint_gives(tmp_path):
    shipped = load_manifest(DEMO_BUNDLE)
    verify_digests(DEMO_BUNDLE, shipped.files())
    fresh = export_bundle(
        ExportOptions(
            checkpoint=DEMO_MODEL / "target", drafter=DEMO_MODEL / "eagle", out=tmp_path / "out", name=shipped.name
        )
    )
    if [entry.sha256 for entry in fresh.files()] == [entry.sha256 for entry in shipped.files()]:
        return
    # Another processor or torch may write other bytes; the rows must be the same.
    chain = make_chain(range(2, 66))
    rows = [Session(StageRunner(d, m, 0, 8)).run(chain) for d, m in ((tmp_path / "out", fresh), (DEMO_BUNDLE, shipped))]
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-4)


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def truncate(path):
    path.write_bytes(path.read_bytes()[:5000])


BROKEN = {
    "config.json is missing": lambda target: (target / "config.json").unlink(),
    "architecture GPT2LMHeadModel is not supported; supported: LlamaForCausalLM": lambda target: edit_config(
        target, architectures=["GPT2LMHeadModel"]
    ),
    "not readable as safetensors": lambda target: truncate(target / "model.safetensors"),
    "mlp.gate_proj.weight has shape [96, 64], expected [100, 64]": lambda target: edit_config(
        target, intermediate_size=100
    ),
    "model.layers.3": lambda target: edit_config(target, num_hidden_layers=4),
    "rope_scaling 'llama3' is not supported": lambda target: edit_config(target, rope_scaling={"rope_type": "llama3"}),
    "tokenizer.json is missing": lambda target: (target / "tokenizer.json").unlink(),
    "not readable as a tokenizer": lambda target: (target / "tokenizer.json").write_text("{}"),
    "head_dim 24 is not a multiple of 16": lambda target: edit_config(target, head_dim=24),
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_checkpoint_is_refused_and_nothing_written(tmp_path, text):
    save_checkpoint(tmp_path / "target")
    BROKEN[text](tmp_path / "target")
    with pytest.raises(CheckpointError) as caught:
        export(tmp_path)
    assert text in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_head_for_another_model_is_refused(tmp_path):
    save_checkpoint(tmp_path / "target")
    save_eagle(tmp_path / "eagle", hidden_size=128)
    with pytest.raises(CheckpointError, match="the drafter's hidden_size is 128, the target's is 64"):
        export(tmp_path, drafter=tmp_path / "eagle")


def test_a_block_that_differs_is_named_and_nothing_written(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "target")
    build = exporting.build_block

    def build_wrong(shape, start, stop, weights):
        block = build(shape, start, stop, weights)
        if start == 1:  # the reference alone changes, after the graph was written
            write = exporting.export_graph

            def write_then_change(module, spec, path):
                write(module, spec, path)
                if module is block:
                    module.layers[0].mlp.down_proj.weight.mul_(1.01)

            monkeypatch.setattr(exporting, "export_graph", write_then_change)
        return block

    monkeypatch.setattr(exporting, "build_block", build_wrong)
    with pytest.raises(ParityError, match=r"layers-001-002\.onnx: layers \[1, 2\): error .* exceeds the tolerance"):
        export(tmp_path, precision="fp32")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_where_it_writes(tmp_path):
    save_checkpoint(tmp_path / "target")
    (tmp_path / "out").mkdir()
    with pytest.raises(BundleError, match="exists already"):
        export(tmp_path)
    with pytest.raises(BundleError, match="is not a bundle"):
        export(tmp_path, force=True)
    (tmp_path / "out").rmdir()
    export(tmp_path)
    before = (tmp_path / "out/manifest.json").read_text()
    export(tmp_path, force=True, name="another")
    assert (tmp_path / "out/manifest.json").read_text() != before


def test_the_command(tmp_path, capsys):
    save_checkpoint(tmp_path / "target")
    arguments = [str(tmp_path / "target"), "--out", str(tmp_path / "out"), "--json"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["parity"]["chain_error"] < 1e-4
    assert "layers [0, 1) of 3: error" in err
    assert main(arguments) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("flowspec-export: ")
    assert main([str(tmp_path / "nothing"), "--out", str(tmp_path / "other")]) == 1
    assert "no such checkpoint directory" in capsys.readouterr().err


def test_help_does_not_wait_for_torch():
    code = "import sys; sys.argv[1:] = ['--help']\ntry:\n import runpy; runpy.run_module('exporter', run_name='__main__')\nexcept SystemExit: print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "usage: flowspec-export" in found
    assert found.splitlines()[-1] == "False"
