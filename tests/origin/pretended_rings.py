"""Rings that write without nodes, and a world of boards to open them over. Every call is kept, to be compared."""

import asyncio
import contextlib
from types import SimpleNamespace

from flowspec_edge.config import Piece
from flowspec_edge.core.planning.placement import Plan, PlannedStage, StagePlan
from flowspec_edge.core.planning.prediction import Outcome
from flowspec_edge.errors import StageFailedError
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.origin.ring import RingStage

NODE = SimpleNamespace(name="origin")
BUNDLE = SimpleNamespace(manifest=SimpleNamespace(name="model"))
OUTCOME = Outcome(10.0, 5.0, "the network", is_network=True)
NAMED = Outcome(10.0, 5.0, "the network from attic to cellar")


class PretendedAnswer:
    """Its text is the prompt, written letter by letter."""

    def __init__(self, prompt):
        self.prompt, self.num_written, self.writers = prompt, 0, []

    @property
    def num_rings(self):
        return len(self.writers)


class PretendedRing:
    """Writes a letter of each text, and the rest once ``gate`` is open."""

    def __init__(self, stages, gate):
        self.stages, self.gate = stages, gate
        self.is_left, self.loss = False, None

    @property
    def is_open(self):
        return self.loss is None and not self.is_left

    @property
    def layers(self):
        return {stage.plan.node: (stage.plan.start, stage.plan.stop) for stage in self.stages}

    def begin(self, prompt, options):
        return PretendedAnswer(prompt)

    async def write(self, answer):
        answer.writers.append(self)
        while answer.num_written < len(answer.prompt):
            answer.num_written += 1
            yield Piece(text=answer.prompt[answer.num_written - 1], token_ids=[answer.num_written])
            await self.gate.wait()
            if self.loss is not None:
                raise StageFailedError(self.loss)
            if self.is_left:
                return
        yield Piece(text="", token_ids=[], finish_reason="length", statistics={"num_rings": answer.num_rings})

    def outcome(self, statistics):
        return OUTCOME

    def leave(self):
        self.is_left = True
        self.gate.set()

    def lose(self, reason):
        self.loss = reason
        self.gate.set()


class World:
    """The boards there are, the plan that would be made of them, and what the service called."""

    def __init__(self):
        self.calls = []
        self.rings = []
        self.found = []
        self.plan = None
        self.failures = {}  # by the name of a call: errors to raise, or None
        self.is_held = False  # rings opened now stop after a letter
        self._changed = asyncio.Event()

    def set(self, *names):
        self.found = [Announcement(node=name, host="127.0.0.1", port=1, cluster="test", version="1") for name in names]
        self._changed.set()

    async def wait_for(self, is_enough, timeout_s):
        assert timeout_s is None
        while not is_enough(self.found):
            self._changed.clear()
            await self._changed.wait()
        return self.found

    async def search(self):
        self._call("search")
        await asyncio.sleep(0)  # long enough for another text to begin
        return self.found

    @contextlib.asynccontextmanager
    async def open_ring(self, node, bundle, found, *, on_fetch, plan_options, plan):
        assert (node, bundle) == (NODE, BUNDLE)
        names = tuple(board.node for board in found)
        self._call("open", names, plan)
        stages = plan.stages if plan is not None else [equal_share(names, number) for number in range(len(names))]
        gate = asyncio.Event()
        if not self.is_held:
            gate.set()
        served = [RingStage(StagePlan(s.node, s.start, s.stop, 0, s.precision), None, 0) for s in stages]
        self.rings.append(PretendedRing(served, gate))
        try:
            yield self.rings[-1]
        finally:
            self._call("close")

    async def plan_layers(self, node, bundle, found, plan_options, stages):
        assert list(stages) == self.rings[-1].stages
        self._call("plan", tuple(board.node for board in found))
        return self.plan or plan_of(**self.rings[-1].layers)

    async def explain_outcome(self, node, bundle, ring, outcome):
        self._call("explain", outcome)
        return NAMED

    def _call(self, name, *arguments):
        self.calls.append((name, *arguments))
        errors = self.failures.get(name, [])
        error = errors.pop(0) if errors else None
        if error is not None:
            raise error


def equal_share(names, number):
    return stage(names[number], 8 * number // len(names), 8 * (number + 1) // len(names))


def stage(node, start, stop, precision=""):
    return PlannedStage(node=node, start=start, stop=stop, memory_bytes=0, precision=precision, left_bytes=0, time=None)


def plan_of(*, is_kept=False, precision="int8", **layers):
    stages = tuple(stage(node, start, stop, precision) for node, (start, stop) in layers.items())
    return Plan(stages=stages, num_rows=1, trip_ms=1.0, interval_ms=1.0, tokens_per_s=1.0, is_kept=is_kept)
