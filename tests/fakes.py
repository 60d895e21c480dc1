"""A ring without sockets or ONNX: the real cores over pretend links, with a model that any wrong mask or slot would betray.

The pretend stage keeps (token, position) in a cache addressed by slots, as a real one does, and hashes what the mask lets a
row see. Its hidden row is thus right exactly if the cache, the moves, the mask and the positions are. A forward that was
cancelled leaves rubbish in its slots.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import zlib
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from flowspec_edge.config import GenerateOptions
from flowspec_edge.core import events as ev
from flowspec_edge.core.speculation.generation import TREE_MARGIN, TargetLimits
from flowspec_edge.core.speculation.origin import Origin
from flowspec_edge.core.speculation.stage import CREDITS_PER_HOP, Stage
from flowspec_edge.core.speculation.tree import NO_PARENT
from flowspec_edge.core.speculation.verify import Sampler

VOCAB = 13
EOS = 0
RUBBISH = (VOCAB, -1)


def path_hash(tokens: list[int]) -> float:
    return float(zlib.crc32(bytes(tokens)) % 100003)


@functools.lru_cache(maxsize=100_000)
def logits_of(hidden: float) -> np.ndarray:
    values = np.random.default_rng(int(hidden)).normal(size=VOCAB) * 2
    values[EOS] -= 2
    return values.astype(np.float32)


def unsplit(prompt: tuple[int, ...], options: GenerateOptions, max_context: int = 512) -> list[int]:
    """What the model writes on its own: no ring, no tree."""
    sampler = Sampler(options, VOCAB)
    tokens = list(prompt)
    while len(tokens) - len(prompt) < options.max_new_tokens and len(tokens) < max_context:
        tokens.append(sampler.draw(logits_of(path_hash(tokens)), len(tokens)))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


class FakeStage:
    """A stage core with a pretend cache. A cancelled forward gives up, or ends before it has noticed."""

    def __init__(self, rng: random.Random, *, is_first: bool, is_last: bool, taps: tuple[int, ...] = ()) -> None:
        self.rng = rng
        self.taps = taps
        self.core = Stage(is_last=is_last)
        self.is_first = is_first
        self.caches: dict[int, np.ndarray] = {}  # [capacity, (token, position)]
        self.job: ev.RunForward | None = None
        self.is_cancelled = False
        self.num_cancelled = 0

    def cancel(self, session: int) -> None:
        assert self.job is not None and self.job.session == session, "there is nothing to cancel"
        assert not self.is_cancelled, "a forward is cancelled once"
        self.is_cancelled = True
        self.num_cancelled += 1

    def run(self) -> ev.ForwardFinished:
        job, self.job = self.job, None
        gives_up, self.is_cancelled = self.is_cancelled and self.rng.random() < 0.7, False
        if job.session not in self.caches:  # closed while running
            return ev.ForwardFinished(np.zeros((len(job.rows), 1), np.float32))
        cache = self.caches[job.session]
        for move in job.moves:
            cache[move.target : move.target + move.length] = cache[move.source : move.source + move.length].copy()
        stop = job.first_slot + len(job.rows)
        if gives_up:
            cache[job.first_slot : stop] = RUBBISH
            return ev.ForwardFinished(np.zeros((len(job.rows), 1), np.float32))
        cache[job.first_slot : stop] = [(row.token, at) for row, at in zip(job.rows, job.positions, strict=True)]
        out = np.zeros((len(job.rows), 1), np.float32)
        for index in range(len(job.rows)):
            seen = cache[:stop][job.mask[index]]
            by_position = seen[np.argsort(seen[:, 1])]
            assert by_position[:, 1].tolist() == list(range(len(seen))), "a row must see each position before it once"
            out[index] = path_hash(by_position[:, 0].tolist())
            if not self.is_first:
                assert job.hidden[index] == out[index], "hidden rows and tree rows got out of step"
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

    def open(self, session: int, prompt: tuple[int, ...]) -> None:
        self.paths[session] = {0: [prompt[0]]}

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
                value = np.float32(path_hash(paths.pop(row.parent)))
                expected = [part for tap in self.taps for part in (value, tap)] or [value]
                assert job.hidden[index].tolist() == expected, "another row's hidden state"
        assert len(paths) <= TREE_MARGIN, "more drafted rows than the drafter has room for"
        rows = job.rows[max(len(job.hidden) - 1, 0) :]
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
    reason: str | None = None
    error: str | None = None
    trips: list[ev.ReportTrip] = field(default_factory=list)


class FakeRing:
    """Origin and stages; messages in FIFO queues per hop and per control link, taken in an order that ``rng`` chooses.

    Time passes by small steps between deliveries. Where nothing is left to deliver it leaps to the origin's deadline.
    """

    def __init__(
        self,
        num_stages: int,
        rng: random.Random,
        skill: float = 0.7,
        max_context: int = 512,
        taps: tuple[int, ...] = (),
    ) -> None:
        limits = TargetLimits(max_context=max_context, vocab_size=VOCAB, eos_token_ids=frozenset({EOS}))
        self.rng = rng
        self.origin = Origin(num_stages=num_stages, limits=limits, has_drafter=True, taps=taps)
        owned: list[list[int]] = [[] for _ in range(num_stages)]
        for tap in taps:
            rng.choice(owned).append(tap)
        self.stages = [
            FakeStage(rng, is_first=i == 0, is_last=i == num_stages - 1, taps=tuple(owned[i]))
            for i in range(num_stages)
        ]
        self.tapped: list[deque] = [deque() for _ in range(num_stages)]  # from stage i straight to the origin
        self.hops: list[deque] = [
            deque() for _ in range(num_stages + 1)
        ]  # hop i ends at stage i, the last at the origin
        self.credits: list[deque] = [deque() for _ in range(num_stages + 1)]  # backwards on hop i
        self.controls: list[deque] = [deque() for _ in range(num_stages)]
        self.drafter = FakeDrafter(rng, skill, taps)
        self.lane: ev.OriginAction | None = None
        self.answers: dict[int, Answer] = {}
        self.prompts: dict[int, tuple[int, ...]] = {}
        self.sent: dict[int, set[int]] = {}  # per session, draft ids
        self.now = 0.0
        self.told_deadline: float | None = None

    def submit(self, session: int, prompt: tuple[int, ...], options: GenerateOptions) -> Answer:
        self.prompts[session] = prompt
        self.sent[session] = set()
        self.answers[session] = Answer()
        self.tell_origin(ev.PromptSubmitted(session, prompt, options))
        return self.answers[session]

    def run(self, max_steps: int = 200_000) -> None:
        """Deliver until nothing is left to deliver, and no deadline to wait for."""
        for _ in range(max_steps):
            if not self.step():
                self.check()
                cores = [self.origin, *(stage.core for stage in self.stages)]
                assert all(core._credits == CREDITS_PER_HOP for core in cores), "a credit was lost"
                return
        raise AssertionError("the ring does not come to rest")

    def step(self) -> bool:
        """Let one thing happen; False where nothing is left to happen."""
        choices = self._choices()
        deadline = self.origin.next_deadline()
        if deadline is not None and deadline != self.told_deadline and (deadline <= self.now or not choices):
            choices.append(functools.partial(self._pass, deadline))
        if not choices:
            return False
        self.now += self.rng.choice((0.0, 0.0, 0.001, 0.01))
        self.rng.choice(choices)()
        return True

    def check(self) -> None:
        self.origin.check()
        for stage in self.stages:
            stage.core.check()

    def tell_origin(self, event: ev.OriginEvent) -> None:
        for action in self.origin.handle(event, self.now):
            match action:
                case ev.OpenSessions(session):
                    self.drafter.open(session, self.prompts[session])
                    for control in self.controls:
                        control.append(ev.SessionRequested(*dataclasses.astuple(action)))
                case ev.SendChunk(session, rows):
                    for row in rows:
                        assert row.id not in self.sent[session], "a row is sent once"
                        assert row.parent == NO_PARENT or row.parent in self.sent[session], "parents go before children"
                        self.sent[session].add(row.id)
                    self.hops[0].append(action)
                case ev.GrantCredit(num_chunks):
                    self.credits[-1].append(num_chunks)
                case ev.BroadcastAdvance(session, at, to):
                    for control in self.controls:
                        control.append(ev.AdvanceArrived(session, at, to))
                case ev.BroadcastTurn(session, turn):
                    for control in self.controls:
                        control.append(ev.TurnBegan(session, turn))
                case ev.RunHead() | ev.RunDraft():
                    assert self.lane is None, "the compute lane takes one job at a time"
                    self.lane = action
                case ev.EmitTokens(session, tokens):
                    self.answers[session].tokens += tokens
                case ev.ReportTrip(session):
                    self.answers[session].trips.append(action)
                case ev.FinishGeneration(session, reason, error):
                    self.answers[session].reason, self.answers[session].error = reason, error
                case ev.CloseSessions(session):
                    del self.drafter.paths[session]
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
                case ev.CancelForward(session):
                    stage.cancel(session)
                case ev.SendChunk():
                    self.hops[index + 1].append(action)
                case ev.GrantCredit(num_chunks):
                    self.credits[index].append(num_chunks)
                case ev.SendTapped():
                    self.tapped[index].append(action)

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
            if self.tapped[index]:
                choices.append(lambda index=index: self._deliver_tapped(index))
            if self.stages[index].job:
                choices.append(lambda index=index: self.tell_stage(index, self.stages[index].run()))
        if self.lane is not None:
            choices.append(self._run_lane)
        return choices

    def _deliver_chunk(self, index: int) -> None:
        chunk = self.hops[index].popleft()
        if index < len(self.stages):
            assert len(chunk.passages) == index
            arrived = (chunk.session, chunk.rows, chunk.num_wanted, chunk.hidden, chunk.turn, chunk.passages)
            self.tell_stage(index, ev.ChunkArrived(*arrived))
        else:
            self.tell_origin(ev.ChunkReturned(chunk.session, chunk.rows, chunk.hidden, chunk.passages))

    def _deliver_tapped(self, index: int) -> None:
        rows = self.tapped[index].popleft()
        self.tell_origin(ev.TappedArrived(rows.session, rows.layer, rows.ids, rows.hidden))

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
            self.tell_origin(self.drafter.run(job))

    def _pass(self, deadline: float) -> None:
        self.told_deadline = deadline
        self.now = max(self.now, deadline)
        self.tell_origin(ev.DeadlinePassed())
