"""The trainer of the demo model: clean text, runs that survive a kill, a loss that trains what drafting meets."""

import copy
import json
import multiprocessing
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from exporter.train_demo import main
from exporter.training.acceptance import Node, Speculation, matched
from exporter.training.batches import Texts
from exporter.training.cached import CachedLayers
from exporter.training.draft_loss import draft_loss, draft_rows
from exporter.training.files import load_head, open_source, read_target, save_target
from exporter.training.least_squares import fit_rows
from exporter.training.network import DraftHead, Drafting, Target, initialize
from exporter.training.optimizer import MuonAdamW, orthogonalize
from exporter.training.run import TOKENIZER, Settings, train
from exporter.training.sampling import continue_texts
from exporter.training.shapes import llama_shape
from exporter.training.text import (
    TOPIC_COPIES,
    Candidate,
    Cleaner,
    Limits,
    gather,
    held_out_repeats,
    held_out_texts,
    held_out_tokens,
    library_texts,
    manual_pages,
    ngrams,
    prompt_texts,
)
from flowspec_edge.errors import TrainingError
from tests.bundles import MadeOnce

pytestmark = pytest.mark.slow
STDLIB = Path(sysconfig.get_path("stdlib"))
SHAPE = llama_shape(32, 64, num_heads=2, num_kv_heads=1, head_dim=16)
NUM_LAYERS, VOCAB_SIZE = 2, 2048
SOURCES = ("textwrap.py", "shlex.py", "fnmatch.py", "calendar.py", "bisect.py", "heapq.py")


def gathered(directory: Path, found: list[Candidate], **limits: Any) -> tuple[str, list[dict[str, Any]]]:
    """The text of a run, and the files it was made of."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    gather(directory, tokenizer, found, Limits(**limits), lambda line: None)
    tokens = np.load(directory / "tokens.npy").tolist()
    return tokenizer.decode(tokens), json.loads((directory / "files.json").read_text())


def from_stdlib(name: str) -> Candidate:
    return Candidate("stdlib", name, (STDLIB / name).read_text())


# The text


def test_held_out_text_never_enters(tmp_path: Path) -> None:
    held_out = held_out_texts()
    renamed = held_out["netrc.py"].replace("netrc", "login_file").replace("# ", "#  ")
    function = held_out["asyncio/queues.py"].split("class Queue")[1][:1500]
    found = [
        replace(from_stdlib("textwrap.py"), source="another"),
        Candidate("copies", "netrc.py", held_out["netrc.py"]),
        Candidate("copies", "renamed.py", renamed),
        Candidate("copies", "with_a_part.py", from_stdlib("calendar.py").text + "\n\nclass Queue" + function),
        Candidate("copies", "a_prompt.py", from_stdlib("heapq.py").text + "\n\n" + max(prompt_texts(), key=len)),
    ]
    text, files = gathered(tmp_path, found)
    assert {file["path"] for file in files} == {"textwrap.py", "with_a_part.py", "a_prompt.py"}
    kept_out = {run for held in [*held_out.values(), *prompt_texts()] for run in ngrams(held)}
    assert not kept_out.intersection(ngrams(text))
    assert "class IllegalMonthError" in text and "def heappushpop" in text  # what is ours to use stayed


def test_copies_are_taken_once(tmp_path: Path) -> None:
    one = from_stdlib("textwrap.py")
    _, files = gathered(tmp_path, [one, replace(one, source="vendored"), from_stdlib("heapq.py")])
    assert sorted(file["path"] for file in files) == ["heapq.py", "textwrap.py"]


def test_our_own_library_may_repeat_what_is_held_out(tmp_path: Path) -> None:
    """More than half of the topic ``compound``, which is held out, stands in ``for``, ``try`` and others once more."""
    topics = {topic.path: topic for topic in library_texts("stdlib", STDLIB) if topic.path.startswith("topics/")}
    assert "topics/for" in topics and "topics/compound" not in topics
    text, files = gathered(tmp_path / "own", [topics["topics/for"]])
    assert [file["path"] for file in files] == ["topics/for"]
    assert text.count('The "for" statement is used to iterate') == TOPIC_COPIES
    another = replace(topics["topics/for"], source="lib/python3.11")
    _, files = gathered(tmp_path / "another", [another, from_stdlib("heapq.py")])
    assert [file["path"] for file in files] == ["heapq.py"]


def test_what_is_repeated_is_known_by_token() -> None:
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    tokens, repeats = held_out_tokens(tokenizer), held_out_repeats(tokenizer)
    assert len(tokens) == len(repeats)
    starts = np.flatnonzero(tokens == 0)
    shares = dict(zip(held_out_texts(), (part.mean() for part in np.split(repeats, starts[1:])), strict=True))
    assert shares["this.py"] == 0 and 0.5 < shares["topics/compound"] < 0.7 and repeats.mean() < 0.3


def test_a_manual_is_read_as_pydoc_prints_it(tmp_path: Path) -> None:
    (tmp_path / "page.rst.txt").write_text(
        "Use :func:`~os.path.join` or :mod:`the module <os>`, never ``os.sep``: :pep:`8` says why.\n" * 4
    )
    (page,) = manual_pages("manual", tmp_path)
    assert page.text.startswith('Use "os.path.join" or "the module", never "os.sep": "8" says why.\n')
    assert page.path == "page.rst.txt"


def test_limits_and_data_tables(tmp_path: Path) -> None:
    table = Candidate("stdlib", "table.py", "TABLE = [\n" + "    0x1234, 0x5678, 0x9abc,\n" * 200 + "]\n")
    names = ("textwrap.py", "heapq.py", "bisect.py")
    project = [replace(from_stdlib(name), source="project", is_project=True) for name in names]
    _, files = gathered(tmp_path, [table, *project], per_project=1)
    assert len(files) == 1  # the limit is met after the first


def test_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="--text"):
        gathered(tmp_path, [])


def test_a_run_of_words_is_what_counts() -> None:
    cleaner = Cleaner(["one two three four five six seven eight nine ten eleven twelve thirteen"])
    assert cleaner.overlaps("zero one two three four five\nsix seven eight nine ten eleven twelve thirteen")
    assert not cleaner.overlaps("one two three four five six seven eight nine ten eleven twelve fourteen")


# Runs


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("text")
    gathered(directory, [from_stdlib(name) for name in SOURCES])
    return directory / "tokens.npy"


def settings(directory: Path, text: Path, **changes: Any) -> Settings:
    directory.mkdir()
    (directory / "tokens.npy").symlink_to(text)
    sizes = {
        "target_tokens": 16 * 512,
        "head_tokens": 16 * 512,
        "own_tokens": 96,
        "target_peak": 0.03,
        "head_peak": 0.003,
        "rows": 64,
        "windows": 4,
        "micro_batches": 2,
        "head_rows": 96,
        "measured_windows": 8,
        "num_workers": 1,
        "is_compiled": False,
        "num_layers": NUM_LAYERS,
        "shape": SHAPE,
    }
    return Settings(directory, **{**sizes, **changes})


def run(options: Settings, num_steps: int | None = None) -> bool:
    return train(options, lambda line: None, num_steps)


def weights(options: Settings) -> dict[str, dict[str, torch.Tensor]]:
    return {
        part: {name: value for name, value in torch.load(options.directory / f"{part}.pt")["module"].items()}
        for part in ("target", "head")
    }


@pytest.fixture(scope="module")
def whole_run(made_once: MadeOnce, tmp_path_factory: pytest.TempPathFactory, text: Path) -> Settings:
    def train_all(root: Path) -> None:
        assert run(settings(root / "run", text))

    unused = settings(tmp_path_factory.mktemp("runs") / "unused", text)
    return replace(unused, directory=made_once("demo training", train_all) / "run")


def test_losses_fall(whole_run: Settings) -> None:
    for part in ("target", "head"):
        curve = json.loads((whole_run.directory / f"{part}-curve.json").read_text())
        held_out = [point["held_out"] for point in curve if "held_out" in point]
        begun = held_out[0] if part == "target" else np.log(VOCAB_SIZE) - 0.5  # a head begins near what it can become
        assert held_out[-1] < begun - 0.3, part
        assert curve[-1]["cpu_s"] > 0


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path, text: Path, whole_run: Settings) -> None:
    options = settings(tmp_path / "stopped", text)
    num_calls = 1
    while not run(options, num_steps=5):  # several stops in the target, several in the head
        num_calls += 1
    assert num_calls > 4
    for part, wanted in weights(whole_run).items():
        for name, value in weights(options)[part].items():
            assert torch.equal(value, wanted[name]), f"{part} {name}"


def test_two_workers_learn_what_one_does(tmp_path: Path, text: Path) -> None:
    alone = settings(tmp_path / "alone", text, target_tokens=2048, head_tokens=2048)
    together = settings(
        tmp_path / "together", text, target_tokens=2048, head_tokens=2048, num_workers=2, micro_batches=1
    )
    assert run(alone) and run(together)
    for name, value in weights(alone)["target"].items():
        torch.testing.assert_close(weights(together)["target"][name], value, atol=2e-5, rtol=2e-3)


def test_a_lost_worker_is_named(tmp_path: Path, text: Path) -> None:
    options = settings(tmp_path / "lost", text, num_workers=2, micro_batches=1)

    def kill_the_other(line: str) -> None:
        for process in multiprocessing.active_children():
            process.kill()

    with pytest.raises(TrainingError, match="worker 0 of 2: another worker is gone"):
        train(options, kill_the_other)


def test_another_run_in_the_directory_is_refused(whole_run: Settings) -> None:
    with pytest.raises(TrainingError, match="holds a run with seed = 0, not 1"):
        run(replace(whole_run, seed=1))


def test_a_head_can_be_trained_for_a_target_as_it_is(tmp_path: Path, text: Path, whole_run: Settings) -> None:
    model = whole_run.directory / "model"
    alone = settings(tmp_path / "alone", text, target_tokens=0, head_tokens=2048, start_from=model)
    assert run(alone)
    kept = load_file(alone.directory / "model/target/model.safetensors")
    for name, value in load_file(model / "target/model.safetensors").items():
        assert torch.equal(kept[name], value), name
    before, after = (
        load_file(run / "eagle/model.safetensors")["fc.weight"] for run in (model, alone.directory / "model")
    )
    assert not torch.equal(before, after)
    with pytest.raises(TrainingError, match="name one with --start-from"):
        run(replace(alone, start_from=None))


def test_a_broken_checkpoint_is_named(tmp_path: Path, text: Path) -> None:
    options = settings(tmp_path / "broken", text)
    (options.directory / "target.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(TrainingError, match=r"target\.pt: not a checkpoint"):
        run(options)


def test_the_result_is_a_published_layout(whole_run: Settings) -> None:
    target = read_target(open_source(whole_run.directory / "model/target"))
    reference = LlamaForCausalLM.from_pretrained(whole_run.directory / "model/target", dtype=torch.float32)
    tokens = torch.randint(2, 2048, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(target.logits(target.features(tokens)), reference(tokens).logits)
    load_head(whole_run.directory / "model/eagle", target.shape)


def test_evaluating_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--evaluate", str(tmp_path)]) == 1
    assert "no such checkpoint directory" in capsys.readouterr().err


# What is trained


@pytest.fixture(scope="module")
def drafting() -> Drafting:
    """Random weights, and a head that drafts every other token."""
    target, head = Target(SHAPE, NUM_LAYERS, VOCAB_SIZE), DraftHead(SHAPE, torch.arange(0, VOCAB_SIZE, 2))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in [*target.parameters(), *head.parameters()]:
            parameter.normal_(0.3 if parameter.ndim == 1 else 0.0, 0.3, generator=generator)
    return Drafting(target.requires_grad_(False), head)


def test_draft_steps_train_what_drafting_meets(drafting: Drafting) -> None:
    """Each row of each step equals the row that a draft of that depth computes, one token at a time."""
    target, head = drafting.target, drafting.head
    tokens = torch.randint(2, 2048, (1, 13), generator=torch.Generator().manual_seed(5))
    num_steps, num_rows = 4, 12
    with torch.no_grad():
        features = target.features(tokens)
        steps = draft_rows(drafting, tokens, features, num_steps)
        for root in range(num_rows - num_steps + 1):
            rows = CachedLayers(head)
            fed, place = features[:, : root + 1], torch.arange(root + 1)
            for step in range(num_steps):
                kept = len(rows)
                seen = torch.ones(len(place), kept + len(place), dtype=torch.bool).tril(kept)
                said = rows.run(drafting.fuse(tokens[:, place + 1], fed), place, seen)[:, -1:]
                torch.testing.assert_close(steps[step][:, root + step], said[:, 0], atol=5e-4, rtol=1e-3)
                fed, place = said, torch.tensor([root + step + 1])


@pytest.mark.parametrize("is_linear", [True, False])
def test_a_new_head_finds_what_is_linear_and_no_more(drafting: Drafting, is_linear: bool) -> None:
    """Where the target's rows follow from the token and the row before, least squares find how, in what is learned.

    Where they follow from nothing, little is made of chance.
    """
    generator, size = torch.Generator().manual_seed(8), SHAPE.hidden_size
    by_token, by_row = (torch.randn(size, size, generator=generator) * 0.15 for _ in range(2))
    tokens = torch.randint(2, 2048, (24, 40), generator=generator)
    features = torch.randn(24, 40, size, generator=generator)
    for column in range(1, 40 * is_linear):
        following = drafting.target.embed_tokens(tokens[:, column]) @ by_token + features[:, column - 1] @ by_row
        features[:, column] = following + 0.5
    features[:, :10] *= 7  # of the prompts, which nothing is learned of
    texts, new = Texts.of_lists(tokens.tolist(), [12] * 24), Drafting(drafting.target, DraftHead(SHAPE))
    initialize(new.head, 1)
    fit_rows(new, [(texts.batch(part), features[part]) for part in (range(8), range(8, 16))], lambda tensor: None)
    with torch.no_grad():
        (found,) = draft_rows(new, tokens[16:], features[16:], 1)
    wanted = features[16:, 11:]
    assert (found[:, 10:] - wanted).pow(2).mean() < wanted.var() * (1e-3 if is_linear else 1.05)


def test_only_the_head_learns_and_only_of_what_is_to_be_learned(drafting: Drafting) -> None:
    target, head = drafting.target, drafting.head
    rng = np.random.default_rng(0)
    texts = Texts.of_lists([rng.integers(1, 1024, length).tolist() for length in (17, 12)], [0, 6])

    def loss() -> torch.Tensor:
        batch = texts.batch([0, 1])
        return draft_loss(drafting, batch, target.features(batch.tokens), 3)

    before = loss()
    before.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
    assert all(p.grad is None for p in target.parameters())
    at = int(texts.starts[1])
    texts.tokens[at + 11] = 2 * int(rng.integers(500))  # drafted in the last step alone, which nothing is learned of
    texts.tokens[at] += 1
    assert loss() != before, "the prompt is context"


def test_larger_trees_take_fewer_verifications(drafting: Drafting) -> None:
    """Of the target's own text; the first token comes with the prompt, and each verification brings one at least."""
    prompt = torch.randint(2, 2048, (20,), generator=torch.Generator().manual_seed(6)).tolist()
    (text,) = continue_texts(drafting.target, [prompt], 44, torch.zeros(1), torch.Generator())
    few, many = (Speculation(drafting, nodes).count_verifications(text, 20) for nodes in (1, 60))
    assert 23 / 7 <= many <= few <= 23
    assert Speculation(drafting, 60).count_verifications(text[:21], 20) == 0


def test_a_path_is_matched_from_the_root() -> None:
    nodes = [Node(7, -1, 1, 0.0), Node(8, -1, 1, 0.0), Node(7, 1, 2, 0.0), Node(9, 0, 2, 0.0), Node(5, 2, 3, 0.0)]
    assert [matched(nodes, text) for text in ([8, 7, 5, 5], [7, 9], [8, 9], [9, 7], [7], [])] == [3, 2, 1, 0, 1, 0]


def test_texts_of_one_batch_are_as_those_of_their_own(drafting: Drafting) -> None:
    """Prompts of all lengths go on together, and those that end leave the others as they are."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(2, 2048, length).tolist() for length in (3, 9, 5)]
    alone = [continue_texts(drafting.target, [prompt], 24, torch.zeros(1), torch.Generator())[0] for prompt in prompts]
    end = alone[1][12]
    cut = [
        text[: text.index(end, len(prompt)) + 1] if end in text[len(prompt) :] else text
        for text, prompt in zip(alone, prompts, strict=True)
    ]
    assert continue_texts(drafting.target, prompts, 24, torch.zeros(3), torch.Generator(), [end]) == cut


def test_a_head_learns_by_its_gradients(drafting: Drafting) -> None:
    learning = Drafting(drafting.target, copy.deepcopy(drafting.head))
    batch = Texts.of_lists(np.random.default_rng(2).integers(1, 1024, (4, 16)).tolist(), [0] * 4).batch(range(4))
    features, optimizer = learning.target.features(batch.tokens), MuonAdamW(learning.head, 0.1)
    losses = []
    for _ in range(8):
        learning.head.zero_grad()
        loss = draft_loss(learning, batch, features, 2)
        loss.backward()
        optimizer.step(0.02, lambda tensor: None)
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5


def test_a_perfect_head_is_accepted_to_the_full_depth(drafting: Drafting, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the target's own layer as oracle in the head's place, each verification gives depth + 1 tokens."""
    perfect = Drafting(drafting.target, DraftHead(SHAPE))
    target = drafting.target
    prompt = torch.randint(2, 2048, (20,), generator=torch.Generator().manual_seed(7)).tolist()
    (plain,) = continue_texts(target, [prompt], 49, torch.zeros(1), torch.Generator())
    speculation = Speculation(perfect, 60)

    def oracle(
        tokens: torch.Tensor, features: torch.Tensor, positions: torch.Tensor, seen: torch.Tensor
    ) -> torch.Tensor:
        speculation.drafted.run(torch.zeros(1, len(tokens), SHAPE.hidden_size), positions, seen)
        wanted = torch.tensor([plain[int(p) + 2] if int(p) + 2 < len(plain) else 0 for p in positions])
        found: torch.Tensor = target.embed_tokens(wanted) * 50
        return found

    monkeypatch.setattr(speculation, "_head", oracle)
    assert speculation.count_verifications(plain, 20) == 4  # 1 token from the prompt, then 7 per verification


def test_orthogonalize_evens_out_singular_values() -> None:
    x = (
        torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(8))
        * torch.tensor([1.0, 1e-3, 1e3])[:, None, None]
    )
    for matrix in (*orthogonalize(x), *orthogonalize(x.transpose(1, 2))):
        values = torch.linalg.svdvals(matrix)
        assert values.min() > 0.6 and values.max() < 1.3


def test_initial_weights_follow_from_the_seed() -> None:
    one, same, other = (Target(SHAPE, NUM_LAYERS, VOCAB_SIZE) for _ in range(3))
    for target, seed in ((one, 1), (same, 1), (other, 2)):
        initialize(target, seed)
    assert torch.equal(one.embed_tokens.weight, same.embed_tokens.weight)
    assert not torch.equal(one.embed_tokens.weight, other.embed_tokens.weight)


def test_saving_keeps_the_tokenizer(tmp_path: Path) -> None:
    target = Target(SHAPE, NUM_LAYERS, VOCAB_SIZE)
    initialize(target, 0)
    save_target(target, tmp_path, TOKENIZER)
    assert (tmp_path / "tokenizer.json").read_bytes() == TOKENIZER.read_bytes()
