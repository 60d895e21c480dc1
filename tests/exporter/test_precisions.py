"""Each precision: what it is worth on a text, and that a row's bits never depend on its chunk."""

import asyncio
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="exporting needs torch: pip install '.[export]'")

from exporter import precisions
from exporter.bundle import ExportOptions, export_bundle
from exporter.quality import QualityCheck
from flowspec_edge.bench.calibrate import calibrate, format_precisions
from flowspec_edge.bundle import Bundle
from flowspec_edge.cli.main import main
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core.planning.placement import standby_memory_bytes
from flowspec_edge.engine import stage_runner
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.errors import BundleError, CheckpointError, QualityError, StageFailedError
from flowspec_edge.manifest import Manifest, Quality, load_manifest
from flowspec_edge.node.node import Node
from flowspec_edge.node.precision_choice import chosen_precision, keep_precision
from flowspec_edge.node.resources import NodeSettings
from flowspec_edge.origin.opening import open_ring
from tests.arm import row_bits
from tests.bundles import MadeOnce
from tests.engine.conftest import Session, make_chain
from tests.exporter.checkpoints import save_checkpoint
from tests.ring.conftest import answer_of, tokens_of

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).parents[2]
NUM_LAYERS = 2
PRECISIONS = tuple(name for name in precisions.PRECISIONS if name != precisions.OWN)
"""Those of checkpoints."""


@pytest.fixture(scope="module")
def directory(made_once: MadeOnce) -> Path:
    """A bundle in every precision; weights large enough for their rounding to matter."""
    return made_once("precisions", export_in_every_precision) / "out"


def export_in_every_precision(root: Path) -> None:
    save_checkpoint(root / "target", num_hidden_layers=NUM_LAYERS, hidden_size=128, intermediate_size=256, head_dim=64)
    text = root / "prose.txt"
    text.write_text("It was the best of times, it was the worst of times, it was the age of wisdom.\n" * 3)
    others = tuple(precision for precision in PRECISIONS if precision != "w8a8")
    options = ExportOptions(
        checkpoint=root / "target",
        drafter=None,
        out=root / "out",
        precision="w8a8",
        also=others,
        eval_text=text,
        max_loss=1.0,
    )
    export_bundle(options)


@pytest.fixture(scope="module")
def manifest(directory: Path) -> Manifest:
    return load_manifest(directory)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_demo_model_and_its_head_come_in_every_precision(
    precision: str, demo_export: Callable[[str], Path]
) -> None:
    directory = demo_export(precision)
    manifest = load_manifest(directory)
    assert manifest.precision == precision and manifest.drafter is not None
    head = Head(directory, manifest)
    rows = np.random.default_rng(4).standard_normal((16, manifest.geometry.hidden_size), np.float32)
    np.testing.assert_array_equal(np.concatenate([head.logits(row[None]) for row in rows]), head.logits(rows))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_rows_bits_do_not_depend_on_its_chunk(directory: Path, manifest: Manifest, precision: str) -> None:
    tokens = np.random.default_rng(4).integers(2, 2048, 64).tolist()
    stage = StageRunner(directory, manifest, 0, NUM_LAYERS, precision=precision)
    head = Head(directory, manifest)  # the bundle's own: w8a8
    chain = make_chain(tokens)
    expected = Session(stage).run(chain)
    logits = head.logits(expected)
    for num_rows in range(1, 65):
        session = Session(stage)
        found = np.concatenate([session.run(chain[i : i + num_rows]) for i in range(0, 64, num_rows)])
        np.testing.assert_array_equal(found, expected)
        parts = [head.logits(found[i : i + num_rows]) for i in range(0, 64, num_rows)]
        np.testing.assert_array_equal(np.concatenate(parts), logits)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_has_the_same_bits_in_every_tree(
    directory: Path, manifest: Manifest, precision: str, num_threads: int
) -> None:
    stage = StageRunner(directory, manifest, 0, NUM_LAYERS, num_threads=num_threads, precision=precision)
    found = [row_bits.compare(stage, manifest.geometry.vocab_size, seed, num_prompt=200) for seed in range(3)]
    compared, differing = (sum(numbers) for numbers in zip(*found, strict=True))
    assert compared > 400 and not differing


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(9, 3), (8, 1), (4, 4)])
def test_a_row_has_the_same_bits_whatever_heads_share(num_heads: int, num_kv_heads: int, tmp_path: Path) -> None:
    """ONNX Runtime takes other code for one row, for one key-value head, and where threads share a product."""
    heads: dict[str, Any] = {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads, "head_dim": 32}
    save_checkpoint(tmp_path / "target", num_hidden_layers=1, hidden_size=64, intermediate_size=64, **heads)
    options = ExportOptions(checkpoint=tmp_path / "target", drafter=None, out=tmp_path / "out", precision="fp32")
    manifest = export_bundle(options)
    stage = StageRunner(options.out, manifest, 0, 1, num_threads=4)
    compared, differing = row_bits.compare(stage, manifest.geometry.vocab_size, seed=3, num_prompt=600, num_chunks=5)
    assert compared > 300 and not differing


@pytest.mark.parametrize("precision", ["w8a8", "fp32"])
def test_a_cache_in_float16_takes_half_and_keeps_the_law(directory: Path, manifest: Manifest, precision: str) -> None:
    halved = StageRunner(directory, manifest, 0, NUM_LAYERS, precision=precision, has_half_cache=True)
    compared, differing = row_bits.compare(halved, manifest.geometry.vocab_size, seed=1, num_prompt=200)
    assert compared > 100 and not differing
    chain = make_chain(np.random.default_rng(4).integers(2, 2048, 64).tolist())
    whole = StageRunner(directory, manifest, 0, NUM_LAYERS, precision=precision)
    rows = Session(halved).run(chain), Session(whole).run(chain)
    assert 0 < np.abs(rows[0] - rows[1]).max() < 0.5
    assert halved._sessions[1].cache.num_bytes * 2 == whole._sessions[1].cache.num_bytes


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_rows_bits_do_not_depend_on_the_number_of_threads(
    directory: Path, manifest: Manifest, precision: str
) -> None:
    chain = make_chain(np.random.default_rng(4).integers(2, 2048, 64).tolist())
    expected = Session(StageRunner(directory, manifest, 0, NUM_LAYERS, precision=precision)).run(chain)
    stage = StageRunner(directory, manifest, 0, NUM_LAYERS, precision=precision, num_threads=3)
    for num_rows in (1, 2, 3, 7, 16, 33, 64):
        session = Session(stage)
        found = np.concatenate([session.run(chain[i : i + num_rows]) for i in range(0, 64, num_rows)])
        np.testing.assert_array_equal(found, expected)


def test_what_is_reported_of_each_precision(manifest: Manifest) -> None:
    quality = {entry.precision: entry for entry in manifest.quality}
    assert tuple(quality) == manifest.precisions == ("w8a8", "fp32", "fp16", "int8", "q8", "int4")
    assert {entry.text for entry in manifest.quality} == {"prose.txt"}
    assert quality["fp32"].max_error < 1e-5
    assert quality["fp32"].max_error < quality["fp16"].max_error < quality["int8"].max_error < 0.1
    assert quality["int8"].max_error < quality["w8a8"].max_error < 0.5
    assert quality["int8"].max_error < quality["int4"].max_error < 2
    assert quality["fp32"].greedy_agreement > 0.9, "the head alone is of another precision"
    for entry in manifest.quality:
        assert entry.num_tokens > 50
        assert abs(entry.perplexity / entry.reference_perplexity - 1) < 0.1


def test_smaller_precisions_have_smaller_files(manifest: Manifest) -> None:
    sizes = {precision: manifest.blocks_of(0, 1, precision)[0].num_bytes for precision in manifest.precisions}
    assert sizes["int4"] < 0.65 * sizes["w8a8"]  # 4 bits, and a float32 scale for 32 weights: 0.625
    assert sizes["w8a8"] < 0.32 * sizes["fp32"]  # a byte, and 1 % of the columns in float32
    assert sizes["fp16"] < 0.6 * sizes["fp32"]
    memory = {precision: manifest.blocks_of(0, 1, precision)[0].memory_bytes for precision in manifest.precisions}
    assert memory["int8"] == memory["fp32"] > memory["w8a8"] > memory["int4"]


LOADED = """
import json, sys
from pathlib import Path
from benchmarks.precisions import anonymous_bytes
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.manifest import load_manifest

directory = Path(sys.argv[1])
manifest = load_manifest(directory)
load = lambda precision: StageRunner(directory, manifest, 0, 2, precision=precision)
taken, kept = {}, [load(precision) for precision in manifest.precisions]
for precision in manifest.precisions:
    before = anonymous_bytes()
    kept += [load(precision) for _ in range(2)]
    taken[precision] = (anonymous_bytes() - before) / 2
print(json.dumps(taken))
"""


def test_layers_take_what_is_planned(directory: Path, manifest: Manifest) -> None:
    """Small ones, which are little more than their operators."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, str(directory)], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    for precision, taken in json.loads(done.stdout).items():
        planned = standby_memory_bytes(manifest.blocks_of(0, NUM_LAYERS, precision))
        assert taken == pytest.approx(planned, rel=0.25), precision


def test_a_stage_gets_the_files_of_its_precision_alone(manifest: Manifest) -> None:
    own = {entry.file for entry in manifest.stage_files(0, 1)}
    assert own == {"blocks/layers-000-001.onnx", "embedding.npy"}
    other = {entry.file for entry in manifest.stage_files(1, 2, "int4")}
    assert other == {"blocks/layers-001-002.int4.onnx", "final_norm.onnx"}
    with pytest.raises(BundleError, match="has no precision 'int3', only w8a8, fp32, fp16, int8, q8, int4"):
        manifest.blocks_of(0, 1, "int3")


def test_precisions_that_are_cut_differently_are_refused(directory: Path, manifest: Manifest, tmp_path: Path) -> None:
    data = json.loads(manifest.to_json())
    data["alternatives"]["int4"][0]["stop"] = 2
    del data["alternatives"]["int4"][1]
    for entry in manifest.files():
        (tmp_path / entry.file).parent.mkdir(exist_ok=True)
        (tmp_path / entry.file).symlink_to(directory / entry.file)
    (tmp_path / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match="cut at different layers"):
        load_manifest(tmp_path)


def test_a_text_that_tells_nothing_is_refused(directory: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoint": directory.parent / "target", "drafter": None, "out": tmp_path / "out"}
    text = tmp_path / "text"
    for content, problem in ((b"\xff\xfe\xfa", "not readable as UTF-8"), (b"a", "has 1 tokens")):
        text.write_bytes(content)
        with pytest.raises(CheckpointError, match=problem):
            export_bundle(ExportOptions(**options, eval_text=text))
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def lose(monkeypatch: pytest.MonkeyPatch, **losses: float) -> None:
    """Have precisions lose as much."""
    measure = QualityCheck.measure

    def measured(check: QualityCheck, precision: str, head_path: Path) -> Quality:
        found = measure(check, precision, head_path)
        return dataclasses.replace(found, perplexity=found.reference_perplexity * (1 + losses[precision]))

    monkeypatch.setattr(QualityCheck, "measure", measured)


def test_a_precision_that_loses_too_much_is_left_out_alone(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose(monkeypatch, int4=0.06, fp32=0.02, w8a8=0.031, q8=0.029)
    told: list[str] = []
    options = ExportOptions(
        checkpoint=directory.parent / "target",
        drafter=None,
        out=tmp_path / "out",
        precision="int4",
        also=("fp32", "w8a8", "q8"),
    )
    manifest = export_bundle(options, report=told.append)
    assert manifest.precision == "fp32", "the first that may stay is the bundle's own, of its head too"
    assert manifest.precisions == ("fp32", "q8") == tuple(entry.precision for entry in manifest.quality)
    assert {f"blocks/{path.name}" for path in (tmp_path / "out/blocks").iterdir()} == {
        block.file for name in manifest.precisions for block in manifest.blocks_of(0, NUM_LAYERS, name)
    }
    refused = [line for line in told if line.endswith("it is left out")]
    assert refused == [
        "int4: perplexity grows by 6.0%, more than --max-loss 3.0%; it is left out",
        "w8a8: perplexity grows by 3.1%, more than --max-loss 3.0%; it is left out",
    ]


def test_where_every_precision_loses_too_much_nothing_is_written(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose(monkeypatch, int4=0.06, w8a8=float("nan"))
    options: dict[str, Any] = {"checkpoint": directory.parent / "target", "drafter": None, "out": tmp_path / "out"}
    with pytest.raises(
        QualityError, match=r"int4: .* 6\.0%, .*; w8a8: .* nan%, .*choose another --precision, or allow"
    ):
        export_bundle(ExportOptions(**options, precision="int4", also=("w8a8",)))
    assert not list(tmp_path.iterdir())


def test_a_device_is_told_the_fastest_precision_at_the_chunk_sizes_in_use(directory: Path, manifest: Manifest) -> None:
    found = calibrate(Bundle.load(directory), num_threads=1, sizes_in_use=(1, 8))
    assert tuple(found.precision_ms) == manifest.precisions
    assert all(set(times) == {1, 8} and min(times.values()) > 0 for times in found.precision_ms.values())
    told = dataclasses.replace(found, precision_ms={"w8a8": {1: 4.0, 8: 4.0}, "int4": {1: 3.0, 8: 5.0}})
    assert told.fastest_precision == "int4"
    lines = format_precisions(told, manifest.quality).splitlines()
    assert all(line.startswith("# ") for line in lines), "comments of a testbed file"
    assert lines[1].split()[:4] == ["#", "w8a8", "4.00", "4.00"]
    assert lines[-1].endswith("for chunks of 1, 8: int4")


def test_a_precision_that_is_wrong_on_this_processor_is_left_out(
    directory: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise BundleError("this processor cuts sums")

    monkeypatch.setattr(stage_runner, "check_integer_products", refuse)
    flipped = dataclasses.replace(manifest, precision="fp32", blocks=manifest.blocks_of(0, 2, "fp32"))
    flipped = dataclasses.replace(flipped, alternatives={"w8a8": manifest.blocks})
    found = calibrate(Bundle(directory, flipped, "flipped"), num_threads=1, sizes_in_use=(1,))
    assert tuple(found.precision_ms) == ("fp32",)
    assert found.refused == {"w8a8": "this processor cuts sums"}
    assert "does not run here: this processor cuts sums" in format_precisions(found, manifest.quality)


def test_a_device_keeps_to_the_precision_that_it_was_told_to_use(
    directory: Path, capsys: pytest.CaptureFixture[str], state: Path
) -> None:
    digest = Bundle.load(directory).digest
    assert chosen_precision(digest) is None
    arguments = ["bench", "--calibrate", "--bundle", str(directory), "--chunk-sizes", "1", "--json"]
    assert main(arguments) == 0
    assert chosen_precision(digest) is None, "measuring alone changes nothing"
    assert "--use-fastest" in capsys.readouterr().err
    assert main([*arguments, "--use-fastest"]) == 0
    assert chosen_precision(digest) == json.loads(capsys.readouterr().out)["fastest_precision"]
    (state / "precisions.json").write_text("not JSON")
    assert chosen_precision(digest) is None


async def test_each_node_runs_its_layers_in_its_own_precision(directory: Path, manifest: Manifest) -> None:
    """The ring writes what one process with the same precisions writes."""
    bundle = Bundle.load(directory)
    keep_precision(bundle.digest, "fp32")  # of which the first node's own setting makes nothing
    nodes = [
        await Node.start(
            NodeSettings(
                name=f"node-{precision}",
                cluster="test",
                bundles=(bundle,),
                memory_bytes=2**30,
                is_announced=False,
                precision=precision,
            )
        )
        for precision in ("int4", None)
    ]
    origin = await Node.start(NodeSettings(name="origin", cluster="test", bundles=(bundle,), is_announced=False))
    prompt = np.random.default_rng(3).integers(2, 2048, 12).tolist()
    try:
        async with open_ring(origin, bundle, [node.announcement for node in nodes]) as ring:
            found = tokens_of(
                await answer_of(ring, prompt, GenerateOptions(max_new_tokens=8, schedule="autoregressive"))
            )
    finally:
        for node in (*nodes, origin):
            await node.close()
    stages = [
        StageRunner(directory, manifest, *range_, precision=p) for range_, p in (((0, 1), "int4"), ((1, 2), "fp32"))
    ]
    session, head = Session(*stages), Head(directory, manifest)
    tokens = list(prompt)
    hidden = session.run(make_chain(tokens))
    while len(tokens) < len(prompt) + 8:
        tokens.append(int(head.logits(hidden[-1:]).argmax()))
        hidden = session.run(make_chain(tokens[-1:], len(tokens) - 1))
    assert found == tokens[len(prompt) :]


async def test_a_node_whose_precision_the_bundle_lacks_says_so(directory: Path) -> None:
    bundle = Bundle.load(directory)
    settings: dict[str, Any] = {"cluster": "test", "bundles": (bundle,), "is_announced": False}
    node = await Node.start(NodeSettings(name="other", memory_bytes=2**30, precision="int3", **settings))
    origin = await Node.start(NodeSettings(name="origin", **settings))
    try:
        with pytest.raises(
            StageFailedError, match="other.*has no precision 'int3', only w8a8, fp32, fp16, int8, q8, int4"
        ):
            async with open_ring(origin, bundle, [node.announcement]):
                pass
    finally:
        await asyncio.gather(node.close(), origin.close())
