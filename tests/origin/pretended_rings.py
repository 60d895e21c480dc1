"""Rings that write without nodes, and a world of boards to open them over. Every call is kept, to be compared."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions, Piece
from flowspec_edge.core.planning.losses import Part, Way
from flowspec_edge.core.planning.packet_loss import Lossy
from flowspec_edge.core.planning.placement import Plan, PlannedStage, StagePlan
from flowspec_edge.core.planning.prediction import Outcome
from flowspec_edge.errors import RingLostError, StageFailedError
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.node.node import Node
from flowspec_edge.node.resources import NodeSettings
from flowspec_edge.origin.engine import LoadEngine
from flowspec_edge.origin.ring import RingStage

NODE = cast(Node, SimpleNamespace(settings=NodeSettings(name="origin", cluster="test", is_announced=False)))
BUNDLE = cast(Bundle, SimpleNamespace(manifest=SimpleNamespace(name="model"), digest="feed" * 16))
OUTCOME = Outcome(10.0, 5.0, "the network", is_network=True)
NAMED = Outcome(10.0, 5.0, "the network from attic to cellar")


class PretendedAnswer:
    """Its text is the prompt, written letter by letter."""

    def __init__(self, prompt: str) -> None:
        self.prompt, self.num_written = prompt, 0
        self.writers: list[PretendedRing] = []

    @property
    def num_rings(self) -> int:
        return len(self.writers)

    @property
    def written(self) -> str:
        return self.prompt[: self.num_written]


class PretendedRing:
    """Writes a letter of each text, and the rest once ``gate`` is open."""

    def __init__(
        self, stages: list[RingStage], gate: asyncio.Event, plan: Plan | None, on_lossy: Callable[[Lossy], None]
    ) -> None:
        self.stages, self.gate, self.plan = stages, gate, plan
        self.lose_packets = on_lossy
        self.abandoned: Part | None = None
        self.is_left = False
        self.error: StageFailedError | None = None
        self._ended = asyncio.Event()

    @property
    def is_open(self) -> bool:
        return self.error is None and not self.is_left

    @property
    def loss(self) -> RingLostError | None:
        return self.error if isinstance(self.error, RingLostError) else None

    async def wait_ended(self) -> None:
        await self._ended.wait()

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        return {stage.plan.node: (stage.plan.start, stage.plan.stop) for stage in self.stages}

    async def begin(self, prompt: str, options: GenerateOptions) -> PretendedAnswer:
        return PretendedAnswer(prompt)

    async def write(self, answer: PretendedAnswer) -> AsyncIterator[Piece]:
        answer.writers.append(self)
        while answer.num_written < len(answer.prompt):
            if self.error is not None:
                raise self.error
            answer.num_written += 1
            yield Piece(text=answer.prompt[answer.num_written - 1], token_ids=[answer.num_written])
            await self.gate.wait()
            if self.error is not None:
                raise self.error
            if self.is_left:
                return
        yield Piece(text="", token_ids=[], finish_reason="length", statistics={"num_rings": answer.num_rings})

    def outcome(self, answer: PretendedAnswer, statistics: dict[str, Any]) -> Outcome | None:
        return OUTCOME if answer.num_rings == 1 else None

    def leave(self, lossy: Part | None = None) -> None:
        self.is_left, self.abandoned = True, lossy
        self._ended.set()
        self.gate.set()

    def lose(self, *nodes: str, failed: str | None = None, cut: Way | None = None) -> None:
        """These nodes no longer answer, or one says that its stage failed, or that it lost its neighbour."""
        self.fail(RingLostError(f"{', '.join(nodes) or failed or cut} is lost", lost=nodes, failed=failed, cut=cut))

    def fail(self, error: StageFailedError) -> None:
        self.error = error
        self._ended.set()
        self.gate.set()


class World:
    """The boards there are, the plan that would be made of them, and what the service called."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.rings: list[PretendedRing] = []
        self.found: list[Announcement] = []
        self.plan: Plan | None = None
        self.failures: dict[str, list[Exception]] = {}  # by the name of a call: what it raises, once each
        self.is_held = False  # rings opened now stop after a letter
        self.there: set[str] = set()  # who answers greetings
        self.doubted: list[str] = []
        self.heard_of: list[str] = []
        self.dead: set[str] = set()  # whom an opening finds lost
        self.cut: list[frozenset[Way]] = []  # what each opening was to go around
        self.leaves_out: set[str] = set()  # whom a ring leaves out that goes around any way
        self.whole: set[Way] = set()  # the cut ways that work again
        self.is_in_doubt: asyncio.Event | None = None  # what the latest opening was given
        self.waits_for: asyncio.Event | None = None  # set, an opening goes on
        self._changed = asyncio.Event()

    def set(self, *names: str) -> None:
        self.found = [announcement(name) for name in names]
        self._changed.set()

    async def wait_for(
        self, is_enough: Callable[[list[Announcement]], bool], timeout_s: float | None
    ) -> list[Announcement]:
        assert timeout_s is None
        while not is_enough(self.found):
            self._changed.clear()
            await self._changed.wait()
        return self.found

    def doubt(self, node: str) -> None:
        self.doubted.append(node)

    def hear_of(self, board: Announcement) -> None:
        self.heard_of.append(board.node)

    async def is_there(self, settings: object, board: Announcement) -> bool:
        self._call("greet", board.node)
        return board.node in self.there

    async def is_whole(self, settings: object, bundle: Bundle, found: Sequence[Announcement], way: Way) -> bool:
        assert bundle is BUNDLE and list(found) == self.found
        self._call("try", way)
        return way in self.whole

    async def search(self) -> list[Announcement]:
        self._call("search")
        await asyncio.sleep(0)  # long enough for another text to begin
        return self.found

    @contextlib.asynccontextmanager
    async def open_ring(
        self,
        node: Node,
        bundle: Bundle,
        found: Sequence[Announcement],
        load_engine: LoadEngine,
        *,
        on_fetch: object,
        plan_options: object,
        plan: Plan | None,
        on_lost: Callable[[Announcement], None],
        cut: frozenset[Way],
        is_urgent: bool,
        is_in_doubt: asyncio.Event,
        on_lossy: Callable[[Lossy], None],
        kept_bytes: int | None,
    ) -> AsyncIterator[PretendedRing]:
        assert node is NODE and bundle is BUNDLE and kept_bytes == 0
        assert is_urgent == bool(self.rings), "not the first ring of all"
        self.is_in_doubt = is_in_doubt
        self.cut.append(cut)
        found = [board for board in found if not (cut and board.node in self.leaves_out)]
        names = tuple(board.node for board in found)
        for board in found:
            if board.node in self.dead:
                on_lost(board)
        self._call("open", names, plan)
        if self.waits_for is not None:
            await self.waits_for.wait()
        gate = asyncio.Event()
        if not self.is_held:
            gate.set()
        if plan is not None:
            plans = [StagePlan(stage.node, stage.start, stage.stop, 0, stage.precision) for stage in plan.stages]
        else:
            plans = [StagePlan(name, *equal_share(len(names), number), 0) for number, name in enumerate(names)]
        ring = PretendedRing([RingStage(stage, announcement(stage.node), 0) for stage in plans], gate, plan, on_lossy)
        self.rings.append(ring)
        try:
            yield ring
        finally:
            ring._ended.set()
            self._call("close")

    async def plan_layers(
        self,
        node: Node,
        bundle: Bundle,
        found: Sequence[Announcement],
        plan_options: object,
        stages: Sequence[RingStage],
        cut: frozenset[Way],
    ) -> Plan:
        assert all(stage in self.rings[-1].stages for stage in stages)
        self._call("plan", tuple(board.node for board in found))
        return self.plan or plan_of(self.rings[-1].layers)

    async def check_room(
        self,
        settings: NodeSettings,
        bundle: Bundle,
        found: Sequence[Announcement],
        stages: Sequence[RingStage],
        cut: frozenset[Way],
    ) -> None:
        names = tuple(board.node for board in found)
        assert all(stage.plan.node in names for stage in stages)
        self._call("room", names, cut)

    async def explain_outcome(self, node: Node, bundle: Bundle, ring: PretendedRing, outcome: Outcome) -> Outcome:
        self._call("explain", outcome)
        return NAMED

    def _call(self, name: str, *arguments: object) -> None:
        self.calls.append((name, *arguments))
        if errors := self.failures.get(name):
            raise errors.pop(0)


def announcement(name: str) -> Announcement:
    return Announcement(node=name, host="127.0.0.1", port=1, cluster="test", version="1")


def equal_share(num_nodes: int, number: int) -> tuple[int, int]:
    return 8 * number // num_nodes, 8 * (number + 1) // num_nodes


def plan_of(layers: Mapping[str, tuple[int, int]], *, is_kept: bool = False, precision: str = "int8") -> Plan:
    """A plan of these layers by node; what it expects plays no part."""
    stages = tuple(
        cast(PlannedStage, SimpleNamespace(node=node, start=start, stop=stop, precision=precision))
        for node, (start, stop) in layers.items()
    )
    return Plan(stages=stages, num_rows=1, trip_ms=1.0, interval_ms=1.0, tokens_per_s=1.0, is_kept=is_kept)
