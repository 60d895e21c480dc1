"""A ring without sockets or ONNX: the real cores over pretend links, with a model that any wrong mask or slot would betray.

The pretend stage keeps (token, position) in a cache addressed by slots, as a real one does, and hashes what the mask lets a
row see. Its hidden row is thus right exactly if the cache, the moves, the mask and the positions are.
"""

from __future__ import annotations

import functools
import random
import zlib
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from flowspec_edge.config import GenerateOptions
from flowspec_edge.core import events as ev
from flowspec_edge.core.generation import TargetLimits
from flowspec_edge.core.origin import Origin
from flowspec_edge.core.stage import Stage
from flowspec_edge.core.verify import make_draw

VOCAB = 13
EOS = 0


def path_hash(tokens: list[int]) -> float:
    return float(zlib.crc32(bytes(tokens)) % 100003)


@functools.lru_cache(maxsize=100_000)
def logits_of(hidden: float) -> np.ndarray:
    values = np.random.default_rng(int(hidden)).normal(size=VOCAB) * 2
    values[EOS] -= 2
    return values.astype(np.float32)


def unsplit(prompt: tuple[int, ...], options: GenerateOptions, max_context: int = 512) -> list[int]:
    """What the model writes on its own: no ring, no tree."""
    draw = make_draw(options)
    tokens = list(prompt)
    while len(tokens) - len(prompt) < options.max_new_tokens and len(tokens) < max_context:
        tokens.append(draw(logits_of(path_hash(tokens)), len(tokens)))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


class FakeStage:
    """A stage core with a pretend cache."""

    def __init__(self, *, is_first: bool, is_last: bool) -> None:
        self.core = Stage(is_last=is_last)
        self.is_first = is_first
        self.caches: dict[int, np.ndarray] = {}  # [capacity, (token, position)]
        self.job: ev.RunForward | None = None

    def run(self) -> ev.ForwardFinished:
        job, self.job = self.job, None
        if job.session not in self.caches:  # closed while running
            return ev.ForwardFinished(np.zeros((len(job.rows), 1), np.float32))
        cache = self.caches[job.session]
        for move in job.moves:
            cache[move.target : move.target + move.length] = cache[move.source : move.source + move.length].copy()
        stop = job.first_slot + len(job.rows)
        cache[job.first_slot : stop] = [(row.token, at) for row, at in zip(job.rows, job.positions, strict=True)]
        out = np.zeros((len(job.rows), 1), np.float32)
        for index in range(len(job.rows)):
            seen = cache[:stop][job.mask[index]]
            by_position = seen[np.argsort(seen[:, 1])]
            assert by_position[:, 1].tolist() == list(range(len(seen))), "a row must see each position before it once"
            out[index] = path_hash(by_position[:, 0].tolist())
            if not self.is_first:
                assert job.hidden[index] == out[index], "hidden rows and tree rows got out of step"
        return ev.ForwardFinished(out)


class FakeDrafter:
    """Guesses the target's likeliest token with probability ``skill``; its features are token paths."""

    def __init__(self, rng: random.Random, skill: float, k: int = 4) -> None:
        self.rng, self.skill, self.k = rng, skill, k
        self.stable: dict[int, list[int]] = {}
        self.paths: dict[int, dict[int, list[int]]] = {}  # per session, by draft id

    def run(self, job: ev.ExtendDraft | ev.ExpandDraft, prompt: tuple[int, ...]) -> ev.DraftFinished:
        if isinstance(job, ev.ExtendDraft):
            path = self.stable.setdefault(job.session, [prompt[0]])
            for row, position, hidden in zip(job.rows, job.positions, job.hidden, strict=True):
                assert position == len(path) - 1
                assert hidden[0] == path_hash(path), "the drafter got another row's hidden state"
                path.append(row.token)
            self.paths[job.session] = {job.rows[-1].id: list(path)}
            rows = job.rows[-1:]
        else:
            rows = job.rows
            paths = self.paths[job.session]
            for row in rows:
                paths[row.id] = [*paths[row.parent], row.token]
        tokens = []
        for row in rows:
            best = int(np.argmax(logits_of(path_hash(self.paths[job.session][row.id]))))
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
    reason: str | None = None
    error: str | None = None
    trips: list[ev.ReportTrip] = field(default_factory=list)


class FakeRing:
    """Origin and stages; messages in FIFO queues per hop and per control link, taken in an order that ``rng`` chooses."""

    def __init__(self, num_stages: int, rng: random.Random, skill: float = 0.7, max_context: int = 512) -> None:
        limits = TargetLimits(max_context=max_context, eos_token_ids=frozenset({EOS}))
        self.rng = rng
        self.origin = Origin(num_stages=num_stages, limits=limits, has_drafter=True)
        self.stages = [FakeStage(is_first=i == 0, is_last=i == num_stages - 1) for i in range(num_stages)]
        self.hops: list[deque] = [
            deque() for _ in range(num_stages + 1)
        ]  # hop i ends at stage i, the last at the origin
        self.credits: list[deque] = [deque() for _ in range(num_stages + 1)]  # backwards on hop i
        self.controls: list[deque] = [deque() for _ in range(num_stages)]
        self.drafter = FakeDrafter(rng, skill)
        self.lane: ev.OriginAction | None = None
        self.answers: dict[int, Answer] = {}
        self.prompts: dict[int, tuple[int, ...]] = {}
        self.now = 0.0
        self.num_chunks_sent = 0

    def submit(self, session: int, prompt: tuple[int, ...], options: GenerateOptions) -> Answer:
        self.prompts[session] = prompt
        self.answers[session] = Answer()
        self.tell_origin(ev.PromptSubmitted(session, prompt, options))
        return self.answers[session]

    def run(self, max_steps: int = 200_000) -> None:
        """Deliver until nothing is left to deliver."""
        for _ in range(max_steps):
            choices = self._choices()
            if not choices:
                self.check()
                return
            self.rng.choice(choices)()
        raise AssertionError("the ring does not come to rest")

    def check(self) -> None:
        self.origin.check()
        for stage in self.stages:
            stage.core.check()

    def tell_origin(self, event: ev.OriginEvent) -> None:
        self.now += 0.001
        for action in self.origin.handle(event, self.now):
            match action:
                case ev.OpenSessions(session, capacity):
                    for control in self.controls:
                        control.append(ev.SessionRequested(session, capacity))
                case ev.SendChunk():
                    self.num_chunks_sent += 1
                    self.hops[0].append(action)
                case ev.GrantCredit(num_chunks):
                    self.credits[-1].append(num_chunks)
                case ev.BroadcastAdvance(session, at, to):
                    for control in self.controls:
                        control.append(ev.AdvanceArrived(session, at, to))
                case ev.RunHead() | ev.ExtendDraft() | ev.ExpandDraft():
                    assert self.lane is None, "the compute lane takes one job at a time"
                    self.lane = action
                case ev.EmitTokens(session, tokens):
                    self.answers[session].tokens += tokens
                case ev.ReportTrip(session):
                    self.answers[session].trips.append(action)
                case ev.FinishGeneration(session, reason, error):
                    self.answers[session].reason, self.answers[session].error = reason, error
                case ev.CloseSessions(session):
                    for control in self.controls:
                        control.append(ev.SessionEnded(session))

    def tell_stage(self, index: int, event: ev.StageEvent) -> None:
        stage = self.stages[index]
        for action in stage.core.handle(event, self.now):
            match action:
                case ev.OpenCache(session, capacity):
                    stage.caches[session] = np.full((capacity, 2), -1)
                    self.tell_origin(ev.StageReady(session))
                case ev.FreeCache(session):
                    del stage.caches[session]
                case ev.RunForward():
                    assert stage.job is None
                    stage.job = action
                case ev.SendChunk():
                    self.hops[index + 1].append(action)
                case ev.GrantCredit(num_chunks):
                    self.credits[index].append(num_chunks)

    def _choices(self) -> list:
        choices = []
        for index, hop in enumerate(self.hops):
            if hop:
                choices.append(lambda index=index: self._deliver_chunk(index))
        for index, credit in enumerate(self.credits):
            if credit:
                choices.append(lambda index=index: self._deliver_credit(index))
        for index, control in enumerate(self.controls):
            if control:
                choices.append(lambda index=index: self.tell_stage(index, self.controls[index].popleft()))
            if self.stages[index].job:
                choices.append(lambda index=index: self.tell_stage(index, self.stages[index].run()))
        if self.lane is not None:
            choices.append(self._run_lane)
        return choices

    def _deliver_chunk(self, index: int) -> None:
        chunk = self.hops[index].popleft()
        if index < len(self.stages):
            self.tell_stage(index, ev.ChunkArrived(chunk.session, chunk.rows, chunk.num_wanted, chunk.hidden))
        else:
            self.tell_origin(ev.ChunkReturned(chunk.session, chunk.rows, chunk.hidden))

    def _deliver_credit(self, index: int) -> None:
        event = ev.CreditArrived(self.credits[index].popleft())
        if index:
            self.tell_stage(index - 1, event)
        else:
            self.tell_origin(event)

    def _run_lane(self) -> None:
        job, self.lane = self.lane, None
        if isinstance(job, ev.RunHead):
            self.tell_origin(ev.HeadFinished(np.stack([logits_of(row[0]) for row in job.hidden])))
        else:
            self.tell_origin(self.drafter.run(job, self.prompts[job.session]))
