"""What the origin's planning costs, counted in steps of the interpreter: hardly more with four times the drafts."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np

from flowspec_edge.config import GenerateOptions
from flowspec_edge.core import events as ev
from flowspec_edge.core.rows import Chunk, Passage
from flowspec_edge.core.speculation.drafting import DraftShape
from flowspec_edge.core.speculation.generation import TargetLimits
from flowspec_edge.core.speculation.origin import Origin

SESSION = 1
PROMPT = tuple(range(800, 840))
SHAPE = DraftShape()
NUM_STAGES = 4
MOST_GROWTH = 1.5
"""How much more an event may cost where the tree has 400 drafts instead of 100."""


class Steps:
    """Bytecodes that were executed."""

    num = 0


@contextmanager
def counted() -> Iterator[Steps]:
    steps = Steps()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        frame.f_trace_opcodes = True
        steps.num += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield steps
    finally:
        sys.settrace(before)


class Told:
    """An origin with one generation, which is told what a ring would tell it. Nothing comes back by itself."""

    def __init__(self) -> None:
        limits = TargetLimits(max_context=2000, vocab_size=1000, eos_token_ids=frozenset({0}))
        self.origin = Origin(num_stages=NUM_STAGES, limits=limits, has_drafter=True, shape=SHAPE)
        self.sent: list[Chunk] = []
        self.job: ev.RunHead | ev.RunDraft | None = None
        self.now = 0.0
        self.rng = np.random.default_rng(7)
        self.tell(ev.PromptSubmitted(SESSION, PROMPT, GenerateOptions(max_new_tokens=1000)))
        for stage in range(NUM_STAGES):
            self.tell(ev.StageReady(SESSION, stage))
        self.bring_back(self.sent[-1])
        self.verify(5)

    def tell(self, event: ev.OriginEvent) -> None:
        self.now += 0.01
        for action in self.origin.handle(event, self.now):
            if isinstance(action, ev.SendChunk):
                self.sent.append(action.chunk)
            if isinstance(action, ev.RunHead | ev.RunDraft):
                self.job = action

    def bring_back(self, chunk: Chunk) -> None:
        passages = tuple(Passage(len(chunk.rows), 0.0, 0.02 + 0.001 * len(chunk.rows)) for _ in range(NUM_STAGES))
        hidden = np.zeros((len(chunk.rows), 1), np.float32)
        self.tell(ev.ChunkReturned(Chunk(SESSION, chunk.rows, chunk.num_wanted, hidden, passages=passages)))

    def verify(self, token: int) -> None:
        """The head draws ``token`` after the first row that it has."""
        assert isinstance(self.job, ev.RunHead)
        rows, self.job = self.job.rows, None
        self.tell(ev.HeadFinished((token, *[None] * (len(rows) - 1))))

    def draft(self) -> None:
        """A pass finishes. After each row token 1 is likely, and 63 others are not."""
        job, self.job = self.job, None
        assert isinstance(job, ev.RunDraft)
        num_rows = len(job.rows) - max(len(job.hidden) - 1, 0)
        others = [200 + self.rng.permutation(500)[:63] for _ in range(num_rows)]
        tokens = np.concatenate([np.ones((num_rows, 1), np.int64), others], axis=1)
        self.now += 0.002 * len(job.rows)
        log_probs = np.log(np.tile([0.8, *0.02 * 0.9 ** np.arange(63)], (num_rows, 1))).astype(np.float32)
        self.tell(ev.DraftFinished(tokens, log_probs))
        if self.job is None:  # a chunk was due; now it is late
            self.now += 1.0
            self.tell(ev.DeadlinePassed())


def steps_of(num_rows: int) -> dict[str, int]:
    """Steps of the interpreter by event, with a tree of about so many drafts."""
    told = Told()
    root = told.sent[-1]
    while told.origin.num_drafted(SESSION) < num_rows:
        told.draft()
    found = {}
    with counted() as steps:
        told.draft()
    found["a pass of the drafter"] = steps.num
    with counted() as steps:
        told.tell(ev.CreditArrived(1))
    found["a credit"] = steps.num
    with counted() as steps:
        told.bring_back(root)
    found["a chunk that comes back"] = steps.num
    told.draft()
    with counted() as steps:
        told.verify(1)
    found["a verification"] = steps.num
    assert told.origin.num_drafted(SESSION) > num_rows / 2, "most of the tree hangs below the token that was taken"
    told.origin.check()
    return found


def test_planning_costs_hardly_more_where_the_tree_is_large() -> None:
    small, large = steps_of(90), steps_of(330)
    growth = {name: large[name] / small[name] for name in small}
    assert max(growth.values()) <= MOST_GROWTH, growth
