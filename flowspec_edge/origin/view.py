"""What a service shows of itself to people who watch: its ring, what is expected of it, and who fetches what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from flowspec_edge.core.planning.placement import Plan, StagePlan
from flowspec_edge.core.speculation.lanes import Job, Trip
from flowspec_edge.core.speculation.pictures import RingPicture, TextPicture, Way
from flowspec_edge.core.speculation.pipeline import RingCosts
from flowspec_edge.core.speculation.statistics import GenerationStatistics
from flowspec_edge.origin.dialogue import OnFetch
from flowspec_edge.origin.ring import Ring, RingStage
from flowspec_edge.origin.status import StageWork

MAX_TEXTS = 4
"""Of which trees are told: the viewer's own come first, then those that began first."""
MAX_TOKEN_CHARACTERS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class StageView:
    """A stage of the open ring: layers ``[start, stop)``. ``arithmetic`` begins with the precision."""

    node: str
    address: str
    start: int
    stop: int
    arithmetic: str
    load_ms: int
    fetched_bytes: int
    held_bytes: int
    work: StageWork

    @classmethod
    def of(cls, stage: RingStage, work: StageWork) -> Self:
        return cls(
            node=stage.plan.node,
            address=stage.announcement.address,
            start=stage.plan.start,
            stop=stage.plan.stop,
            arithmetic=stage.arithmetic,
            load_ms=stage.load_ms,
            fetched_bytes=stage.fetched_bytes,
            held_bytes=stage.held_bytes,
            work=work,
        )


class HopView(NamedTuple):
    """A hop of the plan, over its link as measured. ``mbit_per_s`` is None where the rate does not count."""

    start: str
    end: str
    latency_ms: float
    mbit_per_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RateView:
    """Tokens/s that were planned with drafts and without, and those that the ring would bring without, by what its
    parts take. None where there was no plan, or nothing has come back yet.
    """

    planned: float | None
    planned_without_drafts: float | None
    without_drafts: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RingView:
    """The ring that is open. The bytes are those of its data links at the origin."""

    stages: Sequence[StageView]
    hops: Sequence[HopView]
    rates: RateView
    hop_ms: float | None
    sent_bytes: int
    received_bytes: int

    @classmethod
    def of(cls, ring: Ring) -> Self:
        plan, costs = ring.plan, ring.costs
        sent, received = ring.num_bytes
        works = [stage.work for stage in ring.status]
        return cls(
            stages=[StageView.of(stage, work) for stage, work in zip(ring.stages, works, strict=True)],
            hops=[] if plan is None else _hops_of(plan),
            rates=RateView(
                planned=None if plan is None else plan.tokens_per_s,
                planned_without_drafts=None if plan is None else _plain_per_s(plan),
                without_drafts=1 / _plain_token_s(costs) if costs.is_measured else None,
            ),
            hop_ms=1000 * costs.hop_s(1) if costs.is_measured else None,
            sent_bytes=sent,
            received_bytes=received,
        )


def _plain_token_s(costs: RingCosts) -> float:
    """A token's mean time without speculation, as the plan reckons it: the trip of a single row, and the head."""
    return sum(part.line.at(1) for part in (*costs.stages, costs.hops, costs.head))


def _hops_of(plan: Plan) -> list[HopView]:
    rates = (8 / (1000 * hop.link.ms_per_byte) if hop.link.ms_per_byte else None for hop in plan.hops)
    return [HopView(hop.start, hop.end, hop.link.latency_ms, rate) for hop, rate in zip(plan.hops, rates, strict=True)]


def _plain_per_s(plan: Plan) -> float:
    """What the plan expects of single rows, one after the other."""
    stages_ms = sum(stage.time.at(1) for stage in plan.stages)
    return 1000 / (stages_ms + sum(hop.ms(1) for hop in plan.hops) + plan.head_ms)


class FetchView(NamedTuple):
    """Of the layers of a node ``num_bytes`` of ``total_bytes`` have come."""

    node: str
    num_bytes: int
    total_bytes: int


class Fetches:
    """What the nodes of a ring fetch while it opens; each note is passed on."""

    def __init__(self, on_fetch: OnFetch) -> None:
        self._on_fetch = on_fetch
        self._latest: dict[str, FetchView] = {}

    def note(self, plan: StagePlan, num_bytes: int, total_bytes: int) -> None:
        """So many bytes of a stage have come; made for ``open_ring``."""
        self._latest[plan.node] = FetchView(plan.node, num_bytes, total_bytes)
        self._on_fetch(plan, num_bytes, total_bytes)

    @property
    def under_way(self) -> list[FetchView]:
        """Those that are not complete."""
        return [fetch for fetch in self._latest.values() if fetch.num_bytes < fetch.total_bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceView:
    """``boards`` are as ``flowspec devices --json`` has them, and those in ``lost`` are done without until they answer.
    ``reason`` says why no text can be written now, or what the next one waits for.
    """

    model: str
    drafts: str
    origin: str
    is_ready: bool
    reason: str
    ring: RingView | None
    boards: Sequence[dict[str, Any]]
    lost: Sequence[str]
    fetches: Sequence[FetchView]


class ShownRow(NamedTuple):
    """A row of the text: its draft id, and its word, which is empty where it is not the viewer's."""

    id: int
    word: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TextView:
    """A text that is written, as ``TextPicture``; ``drafts`` are columns of rows, with words in place of tokens."""

    session: int
    is_own: bool
    num_prompt: int
    num_read: int
    position: int
    text: Sequence[ShownRow]
    num_drafts: int
    drafts: dict[str, list[Any]]
    ways: Sequence[Way]
    counts: GenerationStatistics

    @classmethod
    def of(cls, text: TextPicture, word_of: Callable[[int], str], *, is_own: bool) -> Self:
        def word(token: int) -> str:
            return word_of(token)[:MAX_TOKEN_CHARACTERS] if is_own else ""

        drafts = text.drafts._asdict()
        words = [*map(word, drafts.pop("tokens"))]
        return cls(
            session=text.session,
            is_own=is_own,
            num_prompt=text.num_prompt,
            num_read=text.num_read,
            position=text.position,
            text=[ShownRow(row.id, word(row.token)) for row in text.text],
            num_drafts=text.num_drafts,
            drafts={**drafts, "words": words},
            ways=text.ways,
            counts=text.counts,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkView:
    """What a ring is at, for one viewer: of texts with the ``label`` it has the words, of others how they grow."""

    now: float
    texts: Sequence[TextView]
    trips: Sequence[Trip]
    jobs: Sequence[Job]

    @classmethod
    def of(cls, picture: RingPicture, word_of: Callable[[int], str], label: str, since: float) -> Self:
        """With those trips and jobs that ended behind ``since``."""

        def is_own(text: TextPicture) -> bool:
            return bool(label) and text.label == label

        shown = sorted(picture.texts, key=lambda text: not is_own(text))[:MAX_TEXTS]
        return cls(
            now=picture.now,
            texts=[TextView.of(text, word_of, is_own=is_own(text)) for text in shown],
            trips=[trip for trip in picture.trips if trip.way.ended > since],
            jobs=[job for job in picture.jobs if job.span.ended > since],
        )
