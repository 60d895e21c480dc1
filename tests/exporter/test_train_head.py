"""``flowspec-train-head``: a tiny head learns from what its tiny target writes, is stopped and goes on, and drafts."""

import json
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="training needs torch: pip install '.[train]'")

import torch
from safetensors.torch import load_file, save_file

from exporter.bundle import ExportOptions, export_bundle
from exporter.drafter import open_draft
from exporter.train_head import STOPPED, main
from exporter.training.batches import Texts
from exporter.training.cached import CachedLayers
from exporter.training.chat_prompts import DIRECTORY, KINDS, read_prompts, trained_and_held_out
from exporter.training.files import load_head, open_source, read_target
from exporter.training.head_run import HeadRun, evaluate_head, train_head
from exporter.training.head_training import DEEPER_COSTS, HeadSettings
from exporter.training.network import Drafting
from exporter.training.shapes import head_shape
from exporter.training.text_costs import DEEPER
from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core.events import RunDraft
from flowspec_edge.core.rows import Row
from flowspec_edge.engine.drafters.eagle3 import load_drafter
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.unsplit import UnsplitModel
from flowspec_edge.errors import CheckpointError, TrainingError
from tests.bundles import MadeOnce
from tests.exporter.checkpoints import save_checkpoint
from tests.narrowing import present
from tests.ring.conftest import answer_of, ring_of, tokens_of

pytestmark = pytest.mark.slow

DRAFTED, NUM_PROMPTS, K = 256, 20, 6
STEPS_AT_ONCE = 11


def run_in(root: Path, **changes: Any) -> HeadRun:
    """Some text, and two batches of answers to 18 prompts, with two more held out."""
    prompts = root / "prompts.txt"
    prompts.write_text("# of names\n" + "\n".join(f"def {name}{{_one|_two}}(" for name in "abcdefghij"))
    sizes: dict[str, Any] = {"num_answers": 16, "answers_at_once": 8, "rows": 40, "epochs": 6, "draft_vocab": DRAFTED}
    head = HeadSettings(batch_size=4, micro_batches=1, draft_steps=3)
    return HeadRun(
        root / "target", root / "run", "tiny", text=(prompts,), prompts=(prompts,), head=head, **{**sizes, **changes}
    )


def make_head(root: Path) -> None:
    save_checkpoint(root / "target")
    change(root / "target", "lm_head.weight", lambda weight: weight * 20)  # it knows what it wants
    assert train_head(run_in(root), lambda line: None)


def change(target: Path, name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    weights = load_file(target / "model.safetensors")
    weights[name] = function(weights[name])
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def trained(made_once: MadeOnce) -> Path:
    """Target and run, with the head in ``run/head``."""
    return made_once("trained head", make_head)


def test_it_learns_what_its_target_writes(trained: Path) -> None:
    curve = json.loads((trained / "run/head-curve.json").read_text())
    for point in [point for point in curve if "held_out" in point]:  # it begins near what so few answers can teach
        assert point["held_out"] < np.log(DRAFTED) - 3, "chance"
        assert point["tokens_per_chain"] > 2
        assert point["first_guess_right"] > 0.4
    tokens = load_head(trained / "run/head", head_shape(open_source(trained / "target").layer_shape)).tokens
    answers = [np.load(path) for path in sorted((trained / "run/answers").iterdir())]
    frequent = Counter(np.concatenate([rows[:, -20:].ravel() for rows in answers]).tolist()).most_common(20)
    assert {token for token, _ in frequent if token >= 0} <= set(present(tokens).tolist())


def test_single_drafts_are_learned_first() -> None:
    """And the hours that are said in advance count each depth as often as it comes."""
    settings = HeadSettings(draft_steps=4)
    depths = [settings.depth_at(step / 1000) for step in range(1000)]
    assert depths == [1] * 625 + [2] * 125 + [3] * 125 + [4] * 125
    assert np.mean(depths) == 1 + DEEPER * (4 - 1)
    work = np.cumsum(1 + DEEPER_COSTS * (np.array(depths) - 1)) / 1000
    for step in (1, 400, 700, 850, 1000):
        assert settings.work_until(step / 1000) == pytest.approx(work[step - 1], rel=0.06)
    plan = settings.plan(8000, [Texts.of_lists([[1] * 11], [0])], 1)
    assert plan.left_s(plan.num_steps, 60) == 0
    assert plan.left_s(plan.num_steps // 2, 60) == pytest.approx(60 * (work[-1] / 0.5 - 1))
    assert {HeadSettings(draft_steps=1).depth_at(step / 1000) for step in range(1000)} == {1}


def test_a_stopped_run_goes_on_to_the_same_bits(trained: Path, tmp_path: Path) -> None:
    """Stopped while it learns, and killed before that while answers are written."""
    (tmp_path / "target").symlink_to(trained / "target")
    run, lines = run_in(tmp_path), list[str]()
    assert not train_head(run, lines.append, num_steps=1)
    (run.directory / "answers/00001.npy").unlink()
    shutil.rmtree(run.directory / "held-out-answers")
    (run.directory / "head.pt").unlink()
    while not train_head(run, lines.append, num_steps=STEPS_AT_ONCE):
        assert not run.head_directory.exists()
    assert sum("going on from step" in line for line in lines) >= 2
    one, other = (load_file(root / "run/head/model.safetensors") for root in (trained, tmp_path))
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.fixture(scope="module")
def bundle(made_once: MadeOnce, trained: Path) -> Bundle:
    def export(root: Path) -> None:
        head = trained / "run/head"
        export_bundle(
            ExportOptions(checkpoint=trained / "target", drafter=head, out=root / "out", precision="fp32", block_size=2)
        )

    return Bundle.load(made_once("bundle with a trained head", export) / "out")


def test_the_bundle_drafts_what_was_trained(trained: Path, bundle: Bundle) -> None:
    """Of verified and drafted rows, by the target's ids and with the probabilities that the trainer computes."""
    target = read_target(open_source(trained / "target"))
    drafting = Drafting(target, load_head(trained / "run/head", head_shape(target.shape)))
    tokens = np.random.default_rng(1).integers(2, 2048, 10).tolist()
    with torch.no_grad():
        features = target.features(torch.tensor([tokens]))
        cached, seen = CachedLayers(drafting.head), torch.ones(9, 9, dtype=torch.bool).tril()
        verified = cached.run(drafting.fuse(torch.tensor([tokens[1:]]), features[:, :9]), torch.arange(9), seen)
        child = int(drafting.tokens[7])
        fused = drafting.fuse(torch.tensor([[child]]), verified[:, -1:])
        drafted = cached.run(fused, torch.tensor([9]), torch.ones(1, 10, dtype=torch.bool))
        expected = drafting.log_probs(torch.stack([verified[0, -1], drafted[0, -1]])).topk(K)
    drafter = load_drafter(bundle.directory, bundle.manifest, Head(bundle.directory, bundle.manifest), k=K)
    drafter.open(1, 64)
    pairs = tuple(Row(id, id - 1, tokens[id]) for id in range(1, 10))
    root = drafter.run(RunDraft(1, pairs, np.arange(9), features[0, :9].numpy(), ()))
    below = drafter.run(RunDraft(1, (Row(20, 9, child),), np.array([9]), np.zeros((0, 0), np.float32), ()))
    found = np.concatenate([root.log_probs, below.log_probs]), np.concatenate([root.tokens, below.tokens])
    np.testing.assert_allclose(found[0], expected.values, atol=1e-2)  # the head was trained in float32, and kept in 16
    np.testing.assert_array_equal(found[1][:, 0], drafting.tokens[expected.indices][:, 0])
    assert set(found[1].ravel().tolist()) <= set(drafting.tokens.tolist())


async def test_a_ring_with_the_head_writes_the_same_tokens(bundle: Bundle) -> None:
    unsplit, prompt = UnsplitModel(bundle.directory, bundle.manifest), list(range(2, 22))
    for temperature in (0.0, 0.7):
        options = GenerateOptions(max_new_tokens=24, temperature=temperature, seed=5)
        async with ring_of(2, bundle) as ring:
            assert tokens_of(await answer_of(ring, prompt, options)) == list(unsplit.generate(prompt, options))


def test_a_head_for_another_model_is_refused_naming_both(trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(trained / "target", other)
    change(other, "model.norm.weight", lambda weight: weight * 1.001)
    open_draft(trained / "run/head", open_source(trained / "target"))
    with pytest.raises(CheckpointError, match=r"trained for tiny \(digest [0-9a-f]{12}\), not for other \(digest"):
        open_draft(trained / "run/head", open_source(other))
    with pytest.raises(CheckpointError, match="not for other"):
        evaluate_head(replace(run_in(trained), model=other), trained / "run/head", 1, lambda line: None)


def test_evaluating_measures_whole_trees(trained: Path) -> None:
    greedy, sampled = evaluate_head(run_in(trained), trained / "run/head", 1, lambda line: None, num_new=12)
    assert (greedy["num_nodes"], greedy["temperature"], sampled["temperature"]) == (60, 0.0, 0.7)
    assert greedy["num_prompts"] == 1 and greedy["acceptance_length"] >= 1


def test_what_cannot_be_trained_is_refused_before_it_begins(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "target").symlink_to(trained / "target")
    run = run_in(tmp_path)
    with pytest.raises(TrainingError, match="nothing to learn from; give --text"):
        train_head(replace(run, num_answers=0, text=()), lambda line: None)
    with pytest.raises(TrainingError, match="--draft-vocab 5: a head drafts 64"):
        train_head(replace(run, draft_vocab=5), lambda line: None)
    with pytest.raises(TrainingError, match="--rows 96: the model's context is 96 tokens"):
        train_head(replace(run, rows=96, directory=tmp_path / "wide"), lambda line: None)
    with pytest.raises(TrainingError, match="--rows 4: too few prompts leave room"):
        train_head(replace(run, rows=4, directory=tmp_path / "narrow"), lambda line: None)
    short = tmp_path / "short.txt"
    short.write_text("too little")
    with pytest.raises(TrainingError, match="has fewer than 81 tokens"):
        train_head(replace(run, num_answers=0, text=(short,), directory=tmp_path / "short"), lambda line: None)
    with pytest.raises(TrainingError, match="holds a run with seed = 0, not 1"):
        train_head(replace(run_in(trained), head=replace(run.head, seed=1)), lambda line: None)
    assert main([str(run.model), "--out", str(tmp_path)]) == 1
    assert "exists already" in capsys.readouterr().err


def test_a_kill_says_how_to_go_on(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(run: HeadRun, report: object) -> bool:
        signal.raise_signal(signal.SIGTERM)
        return True

    monkeypatch.setattr("exporter.training.head_run.train_head", stop)
    lines: list[str] = []
    monkeypatch.setattr("exporter.train_head.report", lines.append)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main([str(trained / "target"), "--out", str(tmp_path / "head")]) == STOPPED
    finally:
        signal.signal(signal.SIGTERM, before)
    assert lines == ["flowspec-train-head: stopped; the same command goes on from here"]


def test_prompts_come_along_and_the_held_out_ones_are_not_among_them(tmp_path: Path) -> None:
    trained, held_out = trained_and_held_out([])
    assert len(trained) >= 300 and len(held_out) == 60 and not set(trained) & set(held_out)
    for kind in KINDS:
        lines = [line for line in (DIRECTORY / f"{kind}.txt").read_text().splitlines() if line[0] != "#"]
        assert len(lines) >= 50
    assert "Write a JSON array of three cities with name and country." in trained
    path = tmp_path / "own.txt"
    path.write_text('Say {yes|no}\\nand "{}".\n# not this\n\n')
    assert read_prompts(path) == ['Say yes\nand "{}".', 'Say no\nand "{}".']
    path.write_text("# none\n")
    with pytest.raises(TrainingError, match="has no prompts"):
        read_prompts(path)
