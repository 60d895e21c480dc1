"""Runs the training of a head for a model as it is, in one directory: prompts, the model's answers, the head.

Each is made once and kept.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporter.fields import read_json
from exporter.source import Source
from exporter.target_digest import refuse_other_target, target_field
from exporter.training.acceptance import NEW_TOKENS, TreeFigures
from exporter.training.batches import Texts
from exporter.training.chat_prompts import Chats, trained_and_held_out
from exporter.training.draft_vocabulary import TokenCounts, num_drafted
from exporter.training.files import load_head, open_source, read_target, save_head
from exporter.training.head_training import HeadSettings, HeadTraining
from exporter.training.kept_files import check_same_run, write_array, write_json
from exporter.training.network import DraftHead, Drafting, Target, initialize
from exporter.training.own_texts import Beginning, OwnTexts
from exporter.training.shapes import head_shape
from exporter.training.text_costs import measure_text_costs
from exporter.training.workers import Report, Worker, run_workers
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.errors import TrainingError

TEMPERATURES, AGAIN = (0.7, 0.0, 0.7, 1.0), (0.7, 1.0)
"""At which the model answers a prompt the first time, the second time and so on; then in turn."""
HELD_OUT_TEMPERATURES = (0.0, 0.7)
HELD_OUT_SHARE = 0.05
"""Of given text, its end."""
LEAST_DRAFT_VOCAB = 64
TREE_NODES, TREE_TEMPERATURES = 60, (0.0, 0.7)


@dataclass(frozen=True)
class HeadRun:
    """What a run trains a head on, and how.

    Attributes:
        model: directory of a checkpoint, or a GGUF file.
        directory: of the run.
        text: files to learn from.
        prompts: files of prompts for the model to answer; those that come along where there are none.
        num_answers: how many of its own answers the model writes, at least.
        rows: tokens of a text at most, its prompt included.
        epochs: how often each text is learned from.
        draft_vocab: tokens that the head drafts; None: a quarter of the model's, 8192 at least.
        start_from: a head to begin with.
        device: as torch names it.
    """

    model: Path
    directory: Path
    name: str
    text: tuple[Path, ...] = ()
    prompts: tuple[Path, ...] = ()
    num_answers: int = 4000
    rows: int = 320
    epochs: float = 6.0
    draft_vocab: int | None = None
    start_from: Path | None = None
    num_workers: int = 1
    device: str = "cpu"
    answers_at_once: int = 64
    head: HeadSettings = field(default_factory=HeadSettings)

    def fixed(self) -> dict[str, Any]:
        """The settings that may not change while a run is continued. Answers and epochs may become more."""
        return {
            "model": str(self.model.resolve()),
            "text": [str(path) for path in self.text],
            "prompts": [str(path) for path in self.prompts],
            "rows": self.rows,
            "draft_vocab": self.draft_vocab,
            "start_from": str(self.start_from) if self.start_from else None,
            "draft_steps": self.head.draft_steps,
            "workers": self.num_workers,
            "device": self.device,
            "seed": self.head.seed,
        }

    @property
    def head_directory(self) -> Path:
        return self.directory / "head"


def train_head(run: HeadRun, report: Report, num_steps: int | None = None) -> bool:
    """Begin or continue a run. True when the head is in ``run.head_directory``, False when it was stopped.

    Raises:
        CheckpointError: the model cannot be read.
        TrainingError: there is nothing to learn from, or the directory holds a run of other settings.
    """
    if not run.text and not run.num_answers:
        raise TrainingError("nothing to learn from; give --text, or ask for --answers")
    if run.draft_vocab is not None and run.draft_vocab < LEAST_DRAFT_VOCAB:
        raise TrainingError(f"--draft-vocab {run.draft_vocab}: a head drafts {LEAST_DRAFT_VOCAB} tokens at least")
    run.directory.mkdir(parents=True, exist_ok=True)
    check_same_run(run.directory, run.fixed())
    source = open_source(run.model)
    if run.rows >= source.geometry.max_context:
        raise TrainingError(f"--rows {run.rows}: the model's context is {source.geometry.max_context} tokens")
    _prepare(run, source, report)
    torch.set_num_threads(1 if run.device == "cpu" else torch.get_num_threads())
    target = read_target(source).to(run.device)
    if not (run.directory / "head.pt").exists():
        _tell_time(run, target, report)
    if run.device == "cpu":
        target.share_memory()  # the workers read it, and none of them has a copy of its own
    return run_workers(partial(_work, run, target, num_steps), run.num_workers, run.directory, report)


def evaluate_head(
    run: HeadRun, directory: Path, num_prompts: int, report: Report, *, num_new: int = NEW_TOKENS
) -> list[dict[str, Any]]:
    """Measure the trees of the head in ``directory`` on held-out prompts, of which texts of ``num_new`` tokens come.

    Raises:
        CheckpointError: the model cannot be read, or the head is another model's.
        TrainingError: there is no head.
    """
    source = open_source(run.model)
    refuse_other_target(directory / "config.json", read_json(directory / "config.json"), source)
    target = read_target(source).to(run.device)
    head = load_head(directory, head_shape(target.shape)).to(run.device)
    with tempfile.TemporaryDirectory() as directory_of_tokenizer:
        tokenizer = Path(directory_of_tokenizer) / "tokenizer.json"
        source.write_tokenizer(tokenizer, report)
        chats = Chats(source, tokenizer)
    prompts = [chats.tokens_of(prompt) for prompt in trained_and_held_out(run.prompts)[1][:num_prompts]]
    found = []
    for temperature in TREE_TEMPERATURES:
        drafting, ends = Drafting(target, head), source.eos_token_ids
        figures = TreeFigures.of(drafting, prompts, TREE_NODES, temperature, ends, num_new)
        report(str(figures))
        found.append(figures.as_json())
    return found


def _prepare(run: HeadRun, source: Source, report: Report) -> None:
    """Write the tokens of the given text, and the beginnings of the answers, to the run's directory.

    Where more answers are asked for than before, their beginnings come behind those that there were.
    """
    path = run.directory / "tokenizer.json"
    source.write_tokenizer(path, report)
    trained, held_out = trained_and_held_out(run.prompts) if run.num_answers else ([], [])
    rng, chats = np.random.default_rng(run.head.seed), Chats(source, path)
    asked, kept = (_fitting(run, chats, prompts) for prompts in (trained, held_out))
    if run.num_answers and not (asked and kept):
        raise TrainingError(f"--rows {run.rows}: too few prompts leave room for an answer, which takes half of them")
    asked = [asked[int(place)] for place in rng.permutation(len(asked))]
    num_answers = run.answers_at_once * math.ceil(run.num_answers / run.answers_at_once)  # whole batches
    beginnings = [
        (prompt, TEMPERATURES[number] if number < len(TEMPERATURES) else AGAIN[number % len(AGAIN)])
        for number in range(math.ceil(num_answers / max(1, len(asked))))
        for prompt in asked
    ][:num_answers]
    write_json(run.directory / "answers.json", beginnings)
    measured = [(prompt, temperature) for prompt in kept for temperature in HELD_OUT_TEMPERATURES]
    write_json(run.directory / "held-out-answers.json", measured)
    if asked:
        report(f"prompts: {len(asked)}, for {len(beginnings)} answers; {len(kept)} more are held out")
    tokenizer = Tokenizer(path)
    given = [token for file in run.text for token in tokenizer.encode(_read_text(file))]
    write_array(run.directory / "given.npy", np.array(given, np.int32))


def _fitting(run: HeadRun, chats: Chats, prompts: Sequence[str]) -> list[list[int]]:
    """The tokens of those prompts that leave room for an answer."""
    return [tokens for tokens in map(chats.tokens_of, prompts) if 2 * len(tokens) < run.rows]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as cause:
        raise TrainingError(f"--text {path}: not readable as UTF-8 text ({cause})") from cause


def _work(run: HeadRun, target: Target, num_steps: int | None, worker: Worker, report: Report) -> bool:
    """Do all parts of the run as one of its workers."""
    source = open_source(run.model)
    lessons, held_out = _lessons(run, target, source, worker, report)
    head = _new_head(run, lessons, target, report)
    num_tokens = run.epochs * sum(float(texts.lengths.sum()) for texts in lessons)
    plan = run.head.plan(num_tokens, lessons, run.num_workers)
    training = HeadTraining(Drafting(target, head), lessons, held_out, plan, run.head, run.directory, worker)
    if run.start_from is None:
        training.begin()
    done = training.run(report, num_steps)
    if done and worker.number == 0:
        more = {"bos_token_id": source.bos_token_id, "eos_token_id": source.eos_token_ids}
        save_head(head, run.head_directory, source.geometry.vocab_size, **more, **target_field(source, run.name))
    return done


def _new_head(run: HeadRun, lessons: Sequence[Texts], target: Target, report: Report) -> DraftHead:
    vocab_size = len(target.output_matrix)
    number, tokens = num_drafted(run.draft_vocab, vocab_size), None
    if number < vocab_size:
        counts = TokenCounts(lessons, vocab_size)
        tokens = counts.most_frequent(number)
        report(f"drafts {number} of {vocab_size} tokens, {counts.share(tokens):.2%} of what it learns from")
    head = DraftHead(head_shape(target.shape), tokens)
    initialize(head, run.head.seed)
    if run.start_from is not None:
        head.load_state_dict(load_head(run.start_from, head.shape).state_dict())
    return head.to(run.device)


def _lessons(run: HeadRun, target: Target, source: Source, worker: Worker, report: Report) -> tuple[list[Texts], Texts]:
    """What the head learns from, and what it is measured on."""
    lessons, held_out = [], []
    given = Texts.in_windows(np.load(run.directory / "given.npy", mmap_mode="r"), run.rows)
    if len(given) > 1:
        num_kept = max(1, int(HELD_OUT_SHARE * len(given)))
        lessons.append(given.part(range(len(given) - num_kept)))
        held_out.append(given.part(range(len(given) - num_kept, len(given))))
    for name, kind in (("held-out-answers", held_out), ("answers", lessons)) if run.num_answers else ():
        asked = json.loads((run.directory / f"{name}.json").read_text())
        beginnings = [Beginning(prompt, temperature) for prompt, temperature in asked]
        own = OwnTexts(
            run.directory / name, beginnings, run.rows + 1, run.head.seed, run.answers_at_once, source.eos_token_ids
        )
        kind.append(own.write(target, worker, report))
    if not lessons:
        raise TrainingError(f"--text: has fewer than {2 * run.rows + 1} tokens; give more of it")
    return lessons, held_out[-1]


def _tell_time(run: HeadRun, target: Target, report: Report) -> None:
    """Measure this machine, and say how long the whole run will take."""
    num_given = len(np.load(run.directory / "given.npy", mmap_mode="r")) // run.rows
    asked = [len(json.loads((run.directory / f"{name}.json").read_text())) for name in ("answers", "held-out-answers")]
    drafted = torch.arange(num_drafted(run.draft_vocab, len(target.output_matrix)))
    drafting = Drafting(target, DraftHead(head_shape(target.shape), drafted).to(run.device))
    costs = measure_text_costs(drafting, run.rows, run.answers_at_once, run.head.draft_steps)
    num_texts = num_given + asked[0]
    writing_h = costs.writing_s * sum(asked) / run.num_workers / 3600
    learning_h = (costs.running_s + run.epochs * costs.learning_s) * num_texts / run.num_workers / 3600
    report(
        f"about {writing_h + learning_h:.1f} hours at most, with {run.num_workers} on {run.device}: "
        f"{writing_h:.1f} for {sum(asked)} answers, {learning_h:.1f} to learn from {num_texts} texts "
        f"{run.epochs:g} times; Ctrl-C when you like, and the same command goes on"
    )
