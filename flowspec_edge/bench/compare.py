"""Compares schedules on the virtual clock: every prompt, temperature, testbed and schedule, on all cores.

A task is one prompt at one temperature. Its process records the target's text once, and plays it to every schedule on
every testbed. Tasks are independent of each other, so the figures do not depend on the number of processes.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, groupby
from multiprocessing.synchronize import Event
from pathlib import Path

from flowspec_edge.bench.bound import accepted_places
from flowspec_edge.bench.prompt_tokens import PromptTokens
from flowspec_edge.bench.remembered_drafts import RememberedDrafts
from flowspec_edge.bench.simulated_ring import Watcher
from flowspec_edge.bench.tape import Tape, TapeRecorder
from flowspec_edge.bench.testbed import Testbed
from flowspec_edge.bench.virtual_clock import VirtualAnswer, VirtualRing
from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core.journal import Write
from flowspec_edge.core.speculation.drafting import DraftShape
from flowspec_edge.core.speculation.generation import TargetLimits
from flowspec_edge.core.speculation.verify import Sampler, noise_of
from flowspec_edge.engine.drafters.drafter import Drafter
from flowspec_edge.engine.drafters.eagle1 import Eagle1Drafter
from flowspec_edge.engine.head import Head
from flowspec_edge.errors import BenchError, LosslessError

YARDSTICK = "chunked"
"""The schedule with which the others are compared. It is part of every plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is compared: testbeds, schedules that exist, and the length of each text."""

    testbeds: tuple[Testbed, ...]
    schedules: tuple[str, ...]
    max_new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One prompt at one temperature. ``seed`` is the prompt's place in its set, from 0. The text may be a message to a
    chat model.
    """

    prompt_set: str
    seed: int
    temperature: float
    text: str
    is_message: bool = False

    def options(self, plan: Plan) -> GenerateOptions:
        return GenerateOptions(max_new_tokens=plan.max_new_tokens, temperature=self.temperature, seed=self.seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Sums over generations.

    ``num_decoded`` tokens came after the first ones, in ``decode_s`` seconds of simulated time. The other fields mean
    what they mean in ``VirtualAnswer`` and ``GenerationStatistics``.
    """

    num_generations: int = 0
    num_decoded: int = 0
    decode_s: float = 0.0
    num_tokens: int = 0
    num_verifications: int = 0
    num_rows_sent: int = 0
    num_rows_useful: int = 0
    num_draft_passes: int = 0
    row_seconds: float = 0.0
    num_forwards: int = 0
    num_forward_rows: int = 0

    @classmethod
    def from_answer(cls, answer: VirtualAnswer) -> Figures:
        statistics = answer.statistics
        return cls(
            num_generations=1,
            num_decoded=answer.num_decoded,
            decode_s=answer.decode_s,
            num_tokens=statistics.num_tokens,
            num_verifications=statistics.num_verifications,
            num_rows_sent=statistics.num_rows_sent,
            num_rows_useful=statistics.num_rows_useful,
            num_draft_passes=statistics.num_draft_passes,
            row_seconds=answer.row_seconds,
            num_forwards=answer.num_forwards,
            num_forward_rows=answer.num_forward_rows,
        )

    def __add__(self, other: Figures) -> Figures:
        return Figures(**{name: getattr(self, name) + getattr(other, name) for name in FIELDS})


FIELDS = tuple(field.name for field in fields(Figures))


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one task: figures by testbed and schedule, and the accepted places from which the bound follows.

    ``places`` has them without coupled drafts (False) and with them (True).
    """

    task: Task
    is_looping: bool
    places: dict[bool, list[tuple[int, ...]]] = field(default_factory=dict)
    figures: dict[tuple[str, str], Figures] = field(default_factory=dict)


class Bench:
    """A bundle loaded in this process: its target, drafter and tokenizer.

    ``play`` and ``run`` ask the drafter by way of its memory, which is of one text at a time.
    """

    def __init__(self, bundle: Bundle) -> None:
        directory, manifest = bundle.directory, bundle.manifest
        self._prompts = PromptTokens(bundle)
        self._recorder = TapeRecorder(bundle)
        self.limits = TargetLimits(
            manifest.geometry.max_context, manifest.geometry.vocab_size, frozenset(manifest.eos_token_ids)
        )
        self.drafter: Drafter | None = None
        self._remembered: RememberedDrafts | None = None
        if manifest.drafter is not None:
            head = Head(directory, manifest)
            self.drafter = Eagle1Drafter(directory, manifest, head, k=DraftShape().proposals)
            self._remembered = RememberedDrafts(self.drafter)

    def record(self, task: Task, options: GenerateOptions) -> Tape:
        """Record what the target writes after the task's prompt. A tape must be played before the next one is recorded.

        Raises:
            BenchError: the prompt leaves no room in the model's context, or the model is not for messages.
        """
        prompt = self._prompts.of(_name(task), task.text, is_message=task.is_message)
        if self._remembered is not None:
            self._remembered.forget()
        return self._recorder.record(prompt, options)

    def play(
        self,
        testbed: Testbed,
        tape: Tape,
        options: GenerateOptions,
        observer: Watcher | None = None,
        write: Write | None = None,
    ) -> VirtualAnswer:
        """Run one generation on simulated time; ``write`` takes the origin's journal.

        Raises:
            RequestError: there is no such schedule.
            LosslessError: the schedule wrote another text than the target.
        """
        ring = VirtualRing(testbed, tape, self._remembered, self.limits, observer=observer, write=write)
        answer = ring.generate(options)
        check_text(answer.tokens, tape.continuation, f"{options.schedule} on {testbed.name}")
        return answer

    def run(self, plan: Plan, task: Task, is_stopping: Callable[[], bool] = lambda: False) -> Outcome | None:
        """Run every schedule on every testbed. Returns None where ``is_stopping`` became true meanwhile."""
        options = task.options(plan)
        tape = self.record(task, options)
        outcome = Outcome(task, tape.is_looping)
        for testbed in plan.testbeds:
            for schedule in plan.schedules:
                if is_stopping():
                    return None
                try:
                    answer = self.play(testbed, tape, replace(options, schedule=schedule))
                except LosslessError as error:
                    raise LosslessError(f"{_name(task)} at temperature {task.temperature:g}: {error}") from error
                outcome.figures[testbed.name, schedule] = Figures.from_answer(answer)
                if schedule == YARDSTICK and not outcome.places and self._remembered is not None:
                    roots = _roots(tape, answer)
                    sampler = Sampler(options, noise_of(self.limits.vocab_size))
                    outcome.places[False] = accepted_places(tape, self._remembered, roots)
                    outcome.places[True] = accepted_places(tape, self._remembered, roots, sampler)
        return outcome


def _name(task: Task) -> str:
    return f"prompt {task.seed} of set {task.prompt_set!r}"


def _roots(tape: Tape, answer: VirtualAnswer) -> list[int]:
    """The positions at which a draft tree began: the last token of each verification but the last."""
    ends = accumulate(len(list(tokens)) for _, tokens in groupby(answer.token_times_s))
    return [tape.num_prompt + end - 1 for end in ends][:-1]


def check_text(written: Sequence[int], expected: Sequence[int], who: str) -> None:
    """Raise LosslessError where ``who`` wrote something else than the target."""
    for place, (token, right) in enumerate(zip(written, expected, strict=False)):
        if token != right:
            raise LosslessError(f"{who} wrote token {token} at place {place}, the target {right}; this is a bug")
    if len(written) != len(expected):
        raise LosslessError(f"{who} wrote {len(written)} tokens, the target {len(expected)}; this is a bug")


# ---------------------------------------------------------------------- processes


class _Process:
    """What each worker process holds."""

    bench: Bench
    stopping: Event


def default_processes() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _start_process(directory: Path, stopping: Event) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _Process.bench = Bench(Bundle.load(directory))
    _Process.stopping = stopping


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_task(plan: Plan, task: Task) -> Outcome | None:
    if _Process.stopping.is_set():
        return None
    return _Process.bench.run(plan, task, _Process.stopping.is_set)


async def run_tasks(
    plan: Plan, tasks: Sequence[Task], bundle: Bundle, *, num_processes: int, on_finish: Callable[[], None]
) -> list[Outcome]:
    """Run tasks in worker processes, and return their outcomes in the order of the tasks.

    ``on_finish`` is called after each task. Cancelling this coroutine ends the processes.

    Raises:
        BenchError: a process was lost.
        FlowspecError: a task failed.
    """
    context = multiprocessing.get_context("spawn")
    stopping = context.Event()
    pool = ProcessPoolExecutor(
        min(num_processes, len(tasks)),
        mp_context=context,
        initializer=_start_process,
        initargs=(bundle.directory, stopping),
    )
    loop = asyncio.get_running_loop()

    # Ctrl-C reaches the whole process group. The processes inherit the blocked signal, so that the parent ends them.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        running = [asyncio.ensure_future(loop.run_in_executor(pool, _run_task, plan, task)) for task in tasks]
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    for one in running:
        one.add_done_callback(lambda one: None if one.cancelled() or one.exception() else on_finish())
    outcomes: list[Outcome] = []
    try:
        for outcome in await asyncio.gather(*running):
            assert outcome is not None, "only a cancelled run stops its processes"
            outcomes.append(outcome)
        return outcomes
    except BrokenProcessPool as cause:
        raise BenchError(
            "a process ended before its work was done; was it killed, or is memory short? Try --processes 1"
        ) from cause
    finally:
        for one in running:
            one.cancel()
        stopping.set()
        pool.shutdown(wait=True, cancel_futures=True)
        await asyncio.gather(*running, return_exceptions=True)
