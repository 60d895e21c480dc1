"""Several clients on one simulated ring: each has its texts written one after the other, all of them at once."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from flowspec_edge.bench.simulated_ring import Clock, SimulatedRing, Watcher
from flowspec_edge.bench.tape import Tape
from flowspec_edge.bench.tape_engines import PlayedTapes, TapeOrigin, TapeStage
from flowspec_edge.bench.testbed import Testbed
from flowspec_edge.bench.virtual_clock import TestbedTimes, TimedAnswer
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core import events as ev
from flowspec_edge.core.rows import Row
from flowspec_edge.core.speculation.generation import TargetLimits
from flowspec_edge.core.speculation.origin import Origin
from flowspec_edge.core.speculation.verify import noise_of
from flowspec_edge.engine.drafters.drafter import Drafter
from flowspec_edge.errors import StageFailedError


@dataclass(frozen=True, slots=True, eq=False)
class AskedText:
    """One text that a client asks for, ``after_s`` seconds after its last one or after the beginning."""

    tape: Tape
    options: GenerateOptions
    after_s: float = 0.0


@dataclass(slots=True)
class ClientText(TimedAnswer):
    """A text as a client got it; the last one of a run may be unfinished. ``asked_s`` is when it was asked for."""

    asked_s: float = 0.0

    @property
    def first_token_s(self) -> float:
        """From the question to the first tokens, of which there must be some."""
        return self.token_times_s[0] - self.asked_s

    @property
    def longest_pause_s(self) -> float:
        """The longest time between two pieces."""
        return max((after - before for before, after in itertools.pairwise(self.token_times_s)), default=0.0)


@dataclass(slots=True)
class SharedTime:
    """What all clients got in ``seconds`` of simulated time, each with its texts. ``busy_s`` is per stage, the origin's
    compute lane last.
    """

    seconds: float
    texts: list[list[ClientText]]
    busy_s: list[float] = field(default_factory=list)

    def num_tokens(self, client: int) -> int:
        return sum(len(text.tokens) for text in self.texts[client])

    @property
    def tokens_per_s(self) -> float:
        """Of all clients together, prompts and waiting included."""
        return sum(self.num_tokens(client) for client in range(len(self.texts))) / self.seconds


class SideBySide(Watcher):
    """Clients on a ring of ``len(testbed.stages)`` stages that was idle before.

    It runs until the first client has all of its texts, so that all are there at any time. The ring keeps ended
    sessions in caches of ``max_kept_slots`` slots.
    """

    def __init__(
        self,
        testbed: Testbed,
        clients: Sequence[Sequence[AskedText]],
        drafter: Drafter | None,
        limits: TargetLimits,
        max_kept_slots: int = 0,
    ) -> None:
        num_stages = len(testbed.stages)
        self._asked = [list(texts) for texts in clients]
        self._shared = SharedTime(0.0, [[] for _ in clients], [0.0] * (num_stages + 1))
        self._writing: dict[int, int] = {}  # the client, per session
        self._sessions = itertools.count(1)
        self._played = PlayedTapes()
        self._clock = Clock()
        self._engine = TapeOrigin(self._played, drafter, noise_of(limits.vocab_size))
        self._ring = SimulatedRing(
            Origin(
                num_stages=num_stages,
                limits=limits,
                has_drafter=drafter is not None,
                max_kept_slots=max_kept_slots,
                expected=testbed.ring_times,
                num_blocks=testbed.num_blocks,
            ),
            self._engine,
            [TapeStage(self._played)] * num_stages,
            self._clock,
            TestbedTimes(testbed),
            [self],
        )

    def run(self) -> SharedTime:
        """Run it to its end.

        Raises:
            RequestError: as on a real ring.
            StageFailedError: the ring came to rest before.
        """
        for client in range(len(self._asked)):
            self._ask_later(client)
        self._clock.run()
        if not self._ring.is_left:
            raise StageFailedError("the simulated ring came to rest before the end of the texts; this is a bug")
        for session in self._writing:
            self._engine.close(session)
        return self._shared

    def see_action(self, action: ev.OriginAction, now_s: float) -> None:
        match action:
            case ev.EmitTokens(session, tokens):
                text = self._shared.texts[self._writing[session]][-1]
                text.tokens += tokens
                text.token_times_s += [now_s] * len(tokens)
            case ev.FinishGeneration(_, "failed", error):
                raise StageFailedError(f"the simulated ring stands still after {now_s:.1f} s; this is a bug ({error})")
            case ev.FinishGeneration(session):
                client = self._writing.pop(session)
                if self._asked[client]:
                    self._ask_later(client)
                else:
                    self._shared.seconds = now_s
                    self._ring.is_left = True

    def see_forward(
        self, stage: int, began_s: float, ended_s: float, rows: tuple[Row, ...], is_cancelled: bool
    ) -> None:
        if not self._ring.is_left:
            self._shared.busy_s[stage] += ended_s - began_s

    def see_compute(self, job: ev.RunHead | ev.RunDraft, began_s: float, ended_s: float) -> None:
        self._shared.busy_s[-1] += ended_s - began_s

    def _ask_later(self, client: int) -> None:
        asked = self._asked[client].pop(0)
        self._clock.after(asked.after_s * 1000, None, functools.partial(self._ask, client, asked))

    def _ask(self, client: int, asked: AskedText) -> None:
        session = next(self._sessions)
        self._writing[session] = client
        self._played.add(session, asked.tape)
        self._shared.texts[client].append(ClientText(asked_s=self._clock.now_s))
        self._ring.tell_origin(ev.PromptSubmitted(session, asked.tape.prompt, asked.options))
