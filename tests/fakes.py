"""A ring without sockets or ONNX: the real cores over pretend links, with a model that shows every wrong slot.

The pretend stage keeps (token, position) in a cache that is addressed by slots, as a real one does, and hashes what a
row attends to. So its hidden row is right exactly if the cache, the moves, the slots and the positions are right. A
forward that was cancelled leaves rubbish in its slots.
"""

from __future__ import annotations

import functools
import random
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from flowspec_edge.bench.simulated_ring import SimulatedRing, Watcher
from flowspec_edge.config import GenerateOptions, TokenLogprobs
from flowspec_edge.core import events as ev
from flowspec_edge.core.journal import Journal
from flowspec_edge.core.limits import CREDITS_PER_HOP, RECENT_ROWS, TREE_MARGIN
from flowspec_edge.core.rows import NO_PARENT, Before, Chunk, Row, SessionSpec, SlotMove
from flowspec_edge.core.speculation.constraint import Constraint, check_drafts
from flowspec_edge.core.speculation.generation import TargetLimits
from flowspec_edge.core.speculation.origin import Origin
from flowspec_edge.core.speculation.stage import Stage
from flowspec_edge.core.speculation.verify import Sampler, draw_tokens, noise_of, rank_drafts
from tests.narrowing import present

VOCAB = 13
EOS = 0
NOISE = noise_of(VOCAB)
RUBBISH = (VOCAB, -1)


def path_hash(tokens: list[int] | npt.NDArray[np.uint8]) -> float:
    return float(zlib.crc32(bytes(tokens)) % 100003)


@functools.lru_cache(maxsize=100_000)
def logits_of(hidden: float) -> np.ndarray:
    values = np.random.default_rng(int(hidden)).normal(size=VOCAB) * 2
    values[EOS] -= 2
    return values.astype(np.float32)


def unsplit(
    prompt: tuple[int, ...], options: GenerateOptions, max_context: int = 512, constraint: Constraint | None = None
) -> list[int]:
    """What the model writes on its own: no ring, no tree."""
    sampler = Sampler(options.for_drawing({EOS}), NOISE, constraint)
    tokens = list(prompt)
    while len(tokens) - len(prompt) < options.max_new_tokens and len(tokens) < max_context:
        before = Before(np.array(tokens), len(prompt))
        tokens.append(sampler.draw(logits_of(path_hash(tokens)), len(tokens), before))
        if tokens[-1] in options.end_token_ids({EOS}):
            break
    return tokens[len(prompt) :]


class FakeStage:
    """Computes with a pretend cache. A cancelled forward gives up, or ends before it has noticed."""

    def __init__(self, rng: random.Random, *, is_first: bool, taps: tuple[int, ...] = ()) -> None:
        self.rng = rng
        self.taps = taps
        self.is_first = is_first
        self.caches: dict[int, np.ndarray] = {}  # [capacity, (token, position)]
        self.num_cancelled = 0

    def open_cache(self, session: int, capacity: int) -> None:
        self.caches[session] = np.full((capacity, 2), -1)

    def free_cache(self, session: int) -> None:
        del self.caches[session]

    def keep_cache(self, session: int, moves: Sequence[SlotMove]) -> None:
        if session in self.caches:  # it may have been freed meanwhile
            self.make(self.caches[session], moves)

    def take_over_cache(self, session: int, kept: int) -> bool:
        if (cache := self.caches.pop(kept, None)) is None or session not in self.caches:
            return False
        num_slots = min(len(cache), len(self.caches[session]))
        self.caches[session][:num_slots] = cache[:num_slots]
        return True

    def make(self, cache: np.ndarray, moves: Sequence[SlotMove]) -> None:
        for move in moves:
            cache[move.target : move.target + move.length] = cache[move.source : move.source + move.length].copy()

    def run(self, job: ev.RunForward, *, is_cancelled: bool) -> ev.ForwardFinished:
        self.num_cancelled += is_cancelled
        gives_up = is_cancelled and self.rng.random() < 0.7
        if job.session not in self.caches:  # closed while running
            return ev.ForwardFinished(np.zeros((len(job.rows), 1), np.float32))
        cache = self.caches[job.session]
        self.make(cache, job.placement.moves)
        first, positions = job.placement.first_slot, job.placement.positions
        stop = first + len(job.rows)
        if gives_up:
            cache[first:stop] = RUBBISH
            return ev.ForwardFinished(np.zeros((len(job.rows), 1), np.float32))
        cache[first:stop] = [(row.token, at) for row, at in zip(job.rows, positions, strict=True)]
        out = np.zeros((len(job.rows), 1), np.float32)
        for index in range(len(job.rows)):
            num_seen = int(positions[index]) + 1
            older = cache[: max(num_seen - RECENT_ROWS, 0)]
            seen = np.concatenate([older, cache[job.placement.recent[index, -num_seen:]]])
            assert seen[:, 1].tolist() == list(range(num_seen)), "a row must see each position before it once, in order"
            out[index] = path_hash(seen[:, 0].astype(np.uint8))
            if not self.is_first:
                assert present(job.hidden)[index] == out[index], "hidden rows and tree rows got out of step"
        if not job.is_tapped:
            return ev.ForwardFinished(out)
        return ev.ForwardFinished(out, {tap: np.hstack([out, np.full_like(out, tap)]) for tap in self.taps})


class FakeDrafter:
    """Guesses the target's likeliest token with probability ``skill``; its features are token paths.

    It remembers what a real one does: the paths of drafted rows and of the last verified one.
    """

    def __init__(self, rng: random.Random, skill: float, taps: tuple[int, ...] = (), k: int = 4) -> None:
        self.rng, self.skill, self.taps, self.k = rng, skill, taps, k
        self.paths: dict[int, dict[int, list[int]]] = {}  # per session, by draft id
        self.texts: dict[int, list[int]] = {}  # per session, what it has taken of its text
        self.kept: dict[int, list[int]] = {}  # the same of sessions that have ended

    def open(self, spec: SessionSpec, prompt: tuple[int, ...]) -> None:
        text = self.kept.pop(spec.kept)[: spec.num_kept + 1] if spec.num_kept else [prompt[0]]
        assert tuple(text) == prompt[: len(text)], "another text's rows"
        self.texts[spec.session], self.paths[spec.session] = text, {len(text) - 1: text}

    def keep(self, session: int, taken: Sequence[int]) -> None:
        """Keep the text up to the last row that was taken."""
        del self.paths[session]
        self.kept[session] = self.texts.pop(session)[: len(taken) + 1]

    def run(self, job: ev.RunDraft) -> ev.DraftFinished:
        if job.session not in self.paths:  # cancelled meanwhile
            return ev.DraftFinished(np.zeros((0, self.k), np.int64), np.zeros((0, self.k), np.float32))
        paths = self.paths[job.session]
        for id in job.dropped:
            paths.pop(id, None)
        for index, (row, position) in enumerate(zip(job.rows, job.positions, strict=True)):
            assert position == len(paths[row.parent]) - 1
            paths[row.id] = [*paths[row.parent], row.token]
            if index < len(job.hidden):
                self.texts[job.session] = paths[row.id]
                value = np.float32(path_hash(paths.pop(row.parent)))
                expected = [part for tap in self.taps for part in (value, tap)] or [value]
                assert job.hidden[index].tolist() == expected, "another row's hidden state"
        assert len(paths) <= TREE_MARGIN, "more drafted rows than the drafter has room for"
        rows = job.rows[max(len(job.hidden) - 1, 0) :]
        if job.paths is not None:
            told = [job.paths.before(place).tokens.tolist() for place in range(len(job.paths.below))]
            assert told == [paths[row.id] for row in rows], "another row's path"
        tokens = []
        for row in rows:
            best = int(np.argmax(logits_of(path_hash(paths[row.id]))))
            others = [token for token in range(VOCAB) if token != best]
            self.rng.shuffle(others)
            guesses = others[: self.k]
            if self.rng.random() < self.skill:
                guesses.insert(self.rng.choice((0, 0, 1)), best)
            tokens.append(guesses[: self.k])
        log_probs = np.log(np.array([[0.6, 0.2, 0.1, 0.05]] * len(rows), np.float32))
        return ev.DraftFinished(np.array(tokens, np.int64), log_probs)


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    reason: str | None = None
    error: str | None = None
    trips: list[ev.ReportTrip] = field(default_factory=list)


class AnyOrder:
    """Takes what is due from any lane, as ``rng`` chooses. Time passes in small steps, or leaps if nothing is due."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.now_s = 0.0
        self._lanes: dict[object, deque[tuple[float, Callable[[], None]]]] = {}

    def after(self, delay_ms: float, lane: str | None, callback: Callable[[], None]) -> None:
        self._lanes.setdefault(object() if lane is None else lane, deque()).append(
            (self.now_s + delay_ms / 1000, callback)
        )

    def step(self) -> bool:
        """Let one thing happen; False where nothing is left to happen."""
        if not self._lanes:
            return False
        due = [lane for lane, waiting in self._lanes.items() if waiting[0][0] <= self.now_s]
        if not due:
            first = min(self._lanes, key=lambda lane: self._lanes[lane][0][0])
            self.now_s, due = self._lanes[first][0][0], [first]
        lane = self.rng.choice(due)
        _, callback = self._lanes[lane].popleft()
        if not self._lanes[lane]:
            del self._lanes[lane]
        self.now_s += self.rng.choice((0.0, 0.0, 0.001, 0.01))
        callback()
        return True


class NoTime:
    """Each step takes no time: all that can happen may happen next."""

    hop_ms = head_ms = 0.0

    def wire_ms(self, hop: int, chunk: Chunk, now_s: float) -> float:
        return 0.0

    def forward_ms(self, stage: int, num_rows: int) -> float:
        return 0.0

    def cancelled_ms(self, stage: int, num_rows: int, passed_ms: float) -> float:
        return 0.0

    def draft_ms(self, num_rows: int) -> float:
        return 0.0


class FakeOrigin:
    """Logits of path hashes, and a drafter that guesses."""

    def __init__(self, drafter: FakeDrafter, constraint: Constraint | None = None) -> None:
        self.drafter = drafter
        self.constraint = constraint
        self.prompts: dict[int, tuple[int, ...]] = {}

    def open(self, spec: SessionSpec) -> None:
        self.drafter.open(spec, self.prompts[spec.session])

    def close(self, session: int) -> None:
        if self.drafter.kept.pop(session, None) is None:
            del self.drafter.paths[session]

    def keep(self, session: int, taken: Sequence[int]) -> None:
        self.drafter.keep(session, taken)

    def check(self, job: ev.CheckDrafts) -> ev.DraftsChecked:
        assert self.constraint is not None
        return check_drafts(job, self.constraint)

    def run(self, job: ev.RunHead | ev.RunDraft) -> ev.HeadFinished | ev.DraftFinished:
        if isinstance(job, ev.RunHead):
            if job.paths is not None:
                told = [path_hash(job.paths.before(place).tokens.astype(np.uint8)) for place in range(len(job.rows))]
                assert told == [row[0] for row in job.hidden], "another row's path"
            constraint = None if job.options.grammar is None else self.constraint
            return draw_tokens(job, np.stack([logits_of(row[0]) for row in job.hidden]), NOISE, constraint)
        return rank_drafts(job, self.drafter.run(job), NOISE, None if job.grammar is None else self.constraint)


class FakeRing(Watcher):
    """The simulated ring in an order that ``rng`` chooses, with pretended engines and several answers at once."""

    def __init__(
        self,
        num_stages: int,
        rng: random.Random,
        skill: float = 0.7,
        max_context: int = 512,
        taps: tuple[int, ...] = (),
        constraint: Constraint | None = None,
        max_kept_slots: int = 0,
    ) -> None:
        self.limits = TargetLimits(max_context=max_context, vocab_size=VOCAB, eos_token_ids=frozenset({EOS}))
        self.origin = Origin(
            num_stages=num_stages, limits=self.limits, has_drafter=True, taps=taps, max_kept_slots=max_kept_slots
        )
        owned: list[list[int]] = [[] for _ in range(num_stages)]
        for tap in taps:
            rng.choice(owned).append(tap)
        self.stages = [FakeStage(rng, is_first=i == 0, taps=tuple(owned[i])) for i in range(num_stages)]
        self.order = AnyOrder(rng)
        self.engine = FakeOrigin(FakeDrafter(rng, skill, taps), constraint)
        self.ring = SimulatedRing(self.origin, self.engine, self.stages, self.order, NoTime(), [self])
        self.answers: dict[int, Answer] = {}
        self.sent: dict[int, dict[int, Row]] = {}  # per session, by draft id
        self.num_taken_over: dict[int, int] = {}  # per session

    @property
    def num_at_work(self) -> int:
        """Stages that run a forward."""
        return sum(running is not None for running in self.ring.running)

    def record(self, origin: Journal, stages: list[Journal]) -> None:
        """From here on each core is told through its journal."""
        self.ring.journals = [origin, *stages]

    def run_to_the_end(self) -> None:
        """Like ``run``, of a ring that may have lost credits."""
        while self.step():
            pass

    def submit(self, session: int, prompt: tuple[int, ...], options: GenerateOptions, num_written: int = 0) -> Answer:
        self.engine.prompts[session] = prompt
        self.sent[session] = {}
        self.answers[session] = Answer()
        self.tell_origin(ev.PromptSubmitted(session, prompt, options, num_written))
        return self.answers[session]

    def sent_paths(self, session: int) -> list[list[int]]:
        """The tokens of the path to each row that was sent."""
        paths: dict[int, list[int]] = {NO_PARENT: []}
        for id, row in self.sent[session].items():
            paths[id] = [*paths[row.parent], row.token]
        return list(paths.values())

    def tell_origin(self, event: ev.OriginEvent) -> None:
        self.ring.tell_origin(event)

    def step(self) -> bool:
        return self.order.step()

    def run(self, max_steps: int = 200_000) -> None:
        """Deliver until nothing is left to deliver, and no deadline to wait for."""
        for _ in range(max_steps):
            if not self.step():
                self.ring.check()
                cores: list[Origin | Stage] = [self.origin, *self.ring.stages]
                assert all(core._credits == CREDITS_PER_HOP for core in cores), "a credit was lost"
                return
        raise AssertionError("the ring does not come to rest")

    def see_action(self, action: ev.OriginAction, now_s: float) -> None:
        match action:
            case ev.OpenSessions(spec):
                self.num_taken_over[spec.session] = spec.num_kept
            case ev.SendChunk(chunk):
                sent = self.sent[chunk.session]
                for row in chunk.rows:
                    assert row.id not in sent, "a row is sent once"
                    is_there = row.parent in sent or row.parent < self.num_taken_over[chunk.session]
                    assert row.parent == NO_PARENT or is_there, "parents go before children"
                    sent[row.id] = row
            case ev.EmitTokens(session, tokens, logprobs):
                self.answers[session].tokens += tokens
                self.answers[session].logprobs += logprobs
            case ev.ReportTrip(session):
                self.answers[session].trips.append(action)
            case ev.FinishGeneration(session, reason, error):
                self.answers[session].reason, self.answers[session].error = reason, error
