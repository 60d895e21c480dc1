"""A ring on simulated time: the very cores that run on boards, the real model's tokens, and costs from a testbed.

Only time is simulated. What the target says comes from a tape of the real model, and what the drafter proposes from the
real draft head, which runs here. The testbed says how long each step takes. The same inputs give the same digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flowspec_edge.bench.simulated_ring import Clock, SimulatedRing, Watcher
from flowspec_edge.bench.tape import Tape
from flowspec_edge.bench.tape_engines import PlayedTapes, TapeOrigin, TapeStage
from flowspec_edge.bench.testbed import Testbed
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core import events as ev
from flowspec_edge.core.journal import Journal, Write
from flowspec_edge.core.rows import Advance, Chunk, Row
from flowspec_edge.core.speculation.constraint import Constraint
from flowspec_edge.core.speculation.drafting import DraftShape
from flowspec_edge.core.speculation.generation import TargetLimits
from flowspec_edge.core.speculation.origin import Origin
from flowspec_edge.core.speculation.statistics import GenerationStatistics
from flowspec_edge.core.speculation.tree import Tree
from flowspec_edge.core.speculation.verify import noise_of
from flowspec_edge.engine.drafters.drafter import Drafter
from flowspec_edge.errors import StageFailedError

SESSION = 1


@dataclass(slots=True)
class TimedAnswer:
    """What one generation gave, and the time in seconds at which each token was final."""

    tokens: list[int] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)

    @property
    def decode_s(self) -> float:
        """From the first tokens to the last: the prompt is left out."""
        return self.token_times_s[-1] - self.token_times_s[0]

    @property
    def num_decoded(self) -> int:
        """Tokens after the first ones."""
        return sum(time > self.token_times_s[0] for time in self.token_times_s)

    @property
    def tokens_per_s(self) -> float:
        return self.num_decoded / self.decode_s if self.decode_s else 0.0


@dataclass(slots=True)
class VirtualAnswer(TimedAnswer):
    """An answer in simulated time.

    ``busy_s`` is per stage, the origin's compute lane last. ``row_seconds`` counts living draft rows under way: sent,
    not back and not pruned, times the seconds for which they were. ``num_forwards`` and ``num_forward_rows`` are those
    of all stages, the prompt's left out.
    """

    statistics: GenerationStatistics = field(default_factory=GenerationStatistics)
    busy_s: list[float] = field(default_factory=list)
    row_seconds: float = 0.0
    num_forwards: int = 0
    num_forward_rows: int = 0


class TestbedTimes:
    """What each step takes on a testbed. A wire carries one chunk at a time."""

    __test__ = False  # pytest takes the name for a test's

    def __init__(self, testbed: Testbed) -> None:
        self._testbed = testbed
        self.hop_ms, self.head_ms = testbed.hop_ms, testbed.head_ms
        self.forward_ms, self.draft_ms = testbed.forward_ms, testbed.draft_ms
        self._wire_free_at_s = [0.0] * (len(testbed.stages) + 1)  # per hop

    def wire_ms(self, hop: int, chunk: Chunk, now_s: float) -> float:
        starts_s = max(now_s, self._wire_free_at_s[hop])
        transfer_s = self._testbed.chunk_bytes(chunk) * 8 / (self._testbed.rate_mbit_per_s * 1e6)
        self._wire_free_at_s[hop] = starts_s + transfer_s
        return (self._wire_free_at_s[hop] - now_s) * 1000

    def cancelled_ms(self, stage: int, num_rows: int, passed_ms: float) -> float:
        """A forward ends behind the layer that runs now."""
        layer_ms = self._testbed.stages[stage].layer_ms(num_rows)
        return math.ceil(passed_ms / layer_ms - 1e-9) * layer_ms - passed_ms


class VirtualRing(Watcher):
    """One generation on a ring of ``len(testbed.stages)`` stages that was idle before.

    With ``write`` the origin's journal is written, text included, so that its core can be run again without the ring.
    ``constraint`` is the grammar of its options, where they have one.
    """

    def __init__(
        self,
        testbed: Testbed,
        tape: Tape,
        drafter: Drafter | None,
        limits: TargetLimits,
        shape: DraftShape | None = None,
        observer: Watcher | None = None,
        write: Write | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        num_stages = len(testbed.stages)
        played = PlayedTapes()
        played.add(SESSION, tape)
        arguments: dict[str, Any] = {
            "num_stages": num_stages,
            "limits": limits,
            "has_drafter": drafter is not None,
            "shape": shape,
            "expected": testbed.ring_times,
            "num_blocks": testbed.num_blocks,
        }
        self._prompt = tape.prompt
        self._clock, self._times = Clock(), TestbedTimes(testbed)
        self._ring = SimulatedRing(
            Origin(**arguments),
            TapeOrigin(played, drafter, noise_of(limits.vocab_size), constraint),
            [TapeStage(played)] * num_stages,
            self._clock,
            self._times,
            [self] if observer is None else [self, observer],
        )
        self._ring.journals[0] = Journal("origin", arguments, write, has_text=True)
        self._answer = VirtualAnswer(busy_s=[0.0] * (num_stages + 1))
        self._tree = Tree()  # what the origin has sent
        self._flying: set[int] = set()  # draft rows under way
        self._flying_since_s = 0.0

    @property
    def origin(self) -> Origin:
        return self._ring.origin

    def generate(self, options: GenerateOptions) -> VirtualAnswer:
        """Run it to its end.

        Raises:
            RequestError: as on a real ring.
            StageFailedError: the ring came to rest before the end of the text.
        """
        self._ring.tell_origin(ev.PromptSubmitted(SESSION, self._prompt, options))
        self._clock.run()
        if not self._ring.is_left:
            raise StageFailedError("the simulated ring came to rest before the end of the text; this is a bug")
        return self._answer

    def see_action(self, action: ev.OriginAction, now_s: float) -> None:
        match action:
            case ev.OpenSessions(spec):
                self._answer.statistics = self.origin.statistics(spec.session)
            case ev.SendChunk(chunk):
                self._count_flying(now_s, sent=chunk.rows)
            case ev.BroadcastAdvance(_, at, to):
                self._tree.advance(Advance(at, to))
                self._count_flying(now_s, landed=self._tree.take_dropped())
            case ev.EmitTokens(_, tokens):
                self._answer.tokens += tokens
                self._answer.token_times_s += [now_s] * len(tokens)
            case ev.FinishGeneration(_, "failed", error):
                raise StageFailedError(f"the simulated ring stands still after {now_s:.1f} s; this is a bug ({error})")
            case ev.FinishGeneration():
                self._count_flying(now_s)
                self._ring.is_left = True

    def see_return(self, chunk: Chunk, now_s: float) -> None:
        self._count_flying(now_s, landed=[row.id for row in chunk.rows])

    def see_forward(
        self, stage: int, began_s: float, ended_s: float, rows: tuple[Row, ...], is_cancelled: bool
    ) -> None:
        self._answer.busy_s[stage] += ended_s - began_s
        if rows[-1].id >= len(self._prompt):
            self._answer.num_forwards += 1
            self._answer.num_forward_rows += len(rows)

    def see_compute(self, job: ev.RunHead | ev.RunDraft, began_s: float, ended_s: float) -> None:
        delay_ms = self._times.head_ms if isinstance(job, ev.RunHead) else self._times.draft_ms(len(job.rows))
        self._answer.busy_s[-1] += delay_ms / 1000

    def _count_flying(self, now_s: float, sent: Sequence[Row] = (), landed: Sequence[int] = ()) -> None:
        """Draft rows take off, or come back or die: count the time until now, then change who is under way."""
        self._answer.row_seconds += len(self._flying) * (now_s - self._flying_since_s)
        self._flying_since_s = now_s
        self._flying.difference_update(landed)
        for row in sent:
            self._tree.add(row)
            if row.id >= len(self._prompt):
                self._flying.add(row.id)
