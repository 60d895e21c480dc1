"""When a service opens a ring, leaves it and moves to another. Rings and plans are pretended, each call is compared."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import pytest

from flowspec_edge.config import GenerateOptions, Piece
from flowspec_edge.core.planning import losses, rebalancing, recovery
from flowspec_edge.core.planning.packet_loss import Lossy
from flowspec_edge.core.planning.placement import Plan
from flowspec_edge.core.planning.prediction import Outcome
from flowspec_edge.core.planning.recovery import MAX_LOSSES
from flowspec_edge.errors import (
    LinkLostError,
    NodeUnavailableError,
    PlacementError,
    RingLostError,
    StageFailedError,
)
from flowspec_edge.origin import losses as keeping_losses
from flowspec_edge.origin import service as serving
from flowspec_edge.origin import upkeep
from flowspec_edge.origin.planning import PlanOptions
from flowspec_edge.origin.remembered import load_draft_gain
from flowspec_edge.origin.service import GenerationService
from flowspec_edge.origin.standby import Standbys
from tests.narrowing import present
from tests.origin.pretended_rings import BUNDLE, NAMED, NODE, OUTCOME, PretendedRing, World, plan_of

OPTIONS = GenerateOptions(max_new_tokens=6)
TEXT = "abcdef"


class MakeService(Protocol):
    def __call__(self, *, follows: bool = True, **options: Any) -> GenerationService: ...


@pytest.fixture(autouse=True)
def no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebalancing, "SETTLE_S", 0.0)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    world.set("attic", "cellar")
    monkeypatch.setattr(serving, "explain_outcome", world.explain_outcome)
    monkeypatch.setattr(keeping_losses, "is_there", world.is_there)
    for name in ("open_ring", "plan_layers", "check_room", "is_whole"):
        monkeypatch.setattr(upkeep, name, getattr(world, name))
    return world


@pytest.fixture
def reported() -> list[str]:
    return []


@pytest.fixture
def service_of(world: World, reported: list[str]) -> MakeService:
    planned = PlanOptions(report=reported.append)

    def make(*, follows: bool = True, **options: Any) -> GenerationService:
        boards = world if follows else None
        return GenerationService(NODE, BUNDLE, world.search, boards=boards, **{"plan_options": planned, **options})

    return make


async def answer_of(service: GenerationService, prompt: str = TEXT) -> list[Piece]:
    async with asyncio.timeout(5), contextlib.aclosing(service.generate(prompt, OPTIONS)) as pieces:
        return [piece async for piece in pieces]


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def ring_of(service: GenerationService) -> PretendedRing:
    assert isinstance(service.ring, PretendedRing)
    return service.ring


def writer_of(service: GenerationService) -> PretendedRing:
    assert isinstance(service.writer, PretendedRing)
    return service.writer


def prediction_in(pieces: list[Piece]) -> object:
    assert pieces[-1].statistics is not None
    return pieces[-1].statistics["prediction"]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


async def settled() -> None:
    """Everything that is due has happened: the pretended parts need a few turns of the loop, and no time."""
    for _ in range(50):
        await asyncio.sleep(0)


OPENED: list[tuple[object, ...]] = [("search",), ("open", ("attic", "cellar"), None)]
HALL = plan_of({"attic": (0, 3), "cellar": (3, 6), "hall": (6, 8)})
THREE = ("attic", "cellar", "hall")


# --------------------------------------------------------------------- opening


async def test_a_ring_is_opened_with_the_first_text_and_serves_the_next(service_of: MakeService, world: World) -> None:
    async with service_of(follows=False) as service:
        assert (service.model, service.ring, service.writer) == ("model", None, None)
        await settled()
        assert world.calls == []
        for _ in range(2):
            assert text_of(await answer_of(service)) == TEXT
            assert world.calls == OPENED
        assert ring_of(service) is writer_of(service) is world.rings[0]
    assert world.calls == [*OPENED, ("close",)]


async def test_texts_that_begin_at_once_share_one_ring(service_of: MakeService, world: World) -> None:
    async with service_of(follows=False) as service:
        pieces = await asyncio.gather(*(answer_of(service, text) for text in ("abc", "xyz")))
    assert [text_of(answer) for answer in pieces] == ["abc", "xyz"]
    assert world.calls == [*OPENED, ("close",)]


async def test_where_no_node_is_found_the_text_fails_and_the_next_looks_again(
    service_of: MakeService, world: World
) -> None:
    world.failures["search"] = [NodeUnavailableError("no node")]
    async with service_of() as service:
        with pytest.raises(NodeUnavailableError, match="no node"):
            await answer_of(service)
        assert service.ring is None
        assert text_of(await answer_of(service)) == TEXT


async def test_where_a_ring_cannot_be_opened_the_text_fails_and_no_board_is_blamed(
    service_of: MakeService, world: World
) -> None:
    world.failures["open"] = [PlacementError("too small")]
    async with service_of() as service:
        with pytest.raises(PlacementError, match="too small"):
            await answer_of(service)
        assert world.calls == OPENED
        assert text_of(await answer_of(service)) == TEXT
        assert world.calls == [*OPENED, *OPENED]


# ---------------------------------------------------------------------- losing


async def begun(service: GenerationService, text: str = TEXT) -> "asyncio.Task[list[Piece]]":
    """A text of which a letter is written, over a ring that stops there."""
    pieces: list[Piece] = []

    async def write() -> list[Piece]:
        async with asyncio.timeout(5), contextlib.aclosing(service.generate(text, OPTIONS)) as answer:
            async for piece in answer:
                pieces.append(piece)
        return pieces

    task = asyncio.create_task(write())
    await until(lambda: pieces or task.done())
    return task


def notices_in(pieces: list[Piece]) -> list[str]:
    return [piece.notice for piece in pieces if piece.notice is not None]


@pytest.mark.parametrize("follows", [True, False])
async def test_a_text_goes_on_over_those_that_are_left(service_of: MakeService, world: World, follows: bool) -> None:
    world.is_held = True
    async with service_of(follows=follows) as service:
        answers = [await begun(service, text) for text in ("abc", "xyz")]
        world.is_held = False
        ring_of(service).lose("cellar")
        pieces = [await answer for answer in answers]
        assert [text_of(answer) for answer in pieces] == ["abc", "xyz"]
        for answer in pieces:
            assert [piece.token_ids for piece in answer] == [[1], [2], [3], []] and not notices_in(answer)
            assert answer[-1].statistics == {"num_rings": 2, "prediction": None}
        opened_again = [call for call in world.calls[len(OPENED) :] if call[0] != "greet"]
        searched = [] if follows else [("search",)]
        assert opened_again == [("close",), *searched, ("open", ("attic",), None)]
        assert ("greet", "cellar") in world.calls and world.doubted == (["cellar"] if follows else [])


async def test_a_new_text_does_not_wait_for_what_was_lost_while_nobody_wrote(
    service_of: MakeService, world: World
) -> None:
    async with service_of() as service:
        await answer_of(service)
        ring_of(service).lose("cellar")
        await settled()
        assert text_of(await answer_of(service)) == TEXT
        assert ring_of(service).layers == {"attic": (0, 8)}


async def test_the_ring_for_which_others_stand_by_is_opened_as_it_was_planned(
    service_of: MakeService, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, plan = list[frozenset[str]](), plan_of({"attic": (0, 8)})

    def take_over(standbys: Standbys, found: frozenset[str], cut: object) -> Plan | None:
        asked.append(found)
        return plan if "cellar" not in found else None

    monkeypatch.setattr(Standbys, "take_over", take_over)
    world.is_held = True
    async with service_of() as service:
        answer = await begun(service)
        world.is_held = False
        ring_of(service).lose("cellar")
        assert text_of(await answer) == TEXT
        assert world.calls[2:4] == [("close",), ("open", ("attic",), plan)]
    assert asked == [frozenset({"attic", "cellar"}), frozenset({"attic"})]


async def test_where_that_ring_has_no_room_another_one_is_planned(
    service_of: MakeService, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of({"attic": (0, 8)})
    monkeypatch.setattr(Standbys, "take_over", lambda standbys, found, cut: plan if len(world.rings) else None)
    world.is_held = True
    async with service_of() as service:
        answer = await begun(service)
        world.is_held = False
        world.failures["open"] = [NodeUnavailableError("attic: its cache is gone")]
        ring_of(service).lose("cellar")
        assert text_of(await answer) == TEXT
    assert world.calls[3:5] == [("open", ("attic",), plan), ("open", ("attic",), None)]


async def test_a_node_that_is_back_is_planned_with_again(service_of: MakeService, world: World) -> None:
    """It answers the greeting that follows its loss; the ring moves to it as to a new board."""
    world.there = {"cellar"}
    async with service_of(plan_options=None) as service:
        await answer_of(service)
        ring_of(service).lose("cellar")
        await until(lambda: ("greet", "cellar") in world.calls)
        await settled()
        assert text_of(await answer_of(service)) == TEXT
        assert ring_of(service).layers == {"attic": (0, 4), "cellar": (4, 8)}
        assert world.heard_of == ["cellar"]


async def test_a_node_that_is_lost_while_a_ring_opens_is_left_out_of_the_next(
    service_of: MakeService, world: World
) -> None:
    world.dead = {"cellar"}
    world.failures["open"] = [LinkLostError("peer cellar: the control link was lost")]
    async with service_of() as service:
        assert text_of(await answer_of(service)) == TEXT
        opened = [call for call in world.calls if call[0] == "open"]
        assert opened == [("open", ("attic", "cellar"), None), ("open", ("attic",), None)]


@pytest.mark.parametrize("is_first", [True, False])
async def test_a_text_that_begins_to_wait_for_a_ring_puts_its_boards_in_doubt(
    service_of: MakeService, world: World, is_first: bool
) -> None:
    async with service_of() as service:
        if not is_first:
            await answer_of(service)
            ring_of(service).lose("cellar")
            await settled()
        world.waits_for = asyncio.Event()
        waiting = asyncio.create_task(answer_of(service))
        await settled()
        is_in_doubt = present(world.is_in_doubt)
        is_in_doubt.clear()
        second = asyncio.create_task(answer_of(service))
        await settled()
        assert is_in_doubt.is_set()
        world.waits_for.set()
        assert [text_of(await text) for text in (waiting, second)] == [TEXT, TEXT]


async def test_a_text_that_comes_while_the_first_ring_is_lost_in_its_opening_waits_too(
    service_of: MakeService, world: World
) -> None:
    world.dead = {"cellar"}
    world.failures["open"] = [LinkLostError("peer cellar: the control link was lost")]
    world.failures["open"] += [PlacementError("too small") for _ in range(100)]
    async with service_of() as service:
        answers = [asyncio.create_task(answer_of(service, text)) for text in ("abc", "klm")]
        await until(lambda: len(world.failures["open"]) < 100)
        await settled()
        assert not any(answer.done() for answer in answers)
        world.failures["open"].clear()
        world.set("attic", "hall")
        assert [text_of(await answer) for answer in answers] == ["abc", "klm"]


async def test_a_node_that_a_ring_was_opened_without_is_news_when_it_is_back(
    service_of: MakeService, world: World
) -> None:
    world.dead, world.there = {"cellar"}, {"cellar"}
    async with service_of(plan_options=None) as service:
        await answer_of(service)
        world.dead.clear()
        await until(lambda: len(world.rings) == 2)
        assert text_of(await answer_of(service)) == TEXT


async def test_a_node_whose_stage_fails_twice_is_left_out_although_it_answers(
    service_of: MakeService, world: World
) -> None:
    world.failures["open"] = [RingLostError("node cellar: its disk is full", failed="cellar") for _ in range(2)]
    async with service_of() as service:
        assert text_of(await answer_of(service)) == TEXT
        opened = [call[1] for call in world.calls if call[0] == "open"]
        assert opened == [("attic", "cellar"), ("attic", "cellar"), ("attic",)]


async def test_a_ring_goes_around_a_way_that_is_cut_until_it_works(
    service_of: MakeService, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "TRY_S", 0.01)
    way = ("attic", "cellar")
    world.is_held = True
    async with service_of() as service:
        answer = await begun(service)
        world.is_held = False
        ring_of(service).lose(cut=("cellar", "attic"))
        assert text_of(await answer) == TEXT
        assert world.cut == [frozenset(), {way}] and not world.doubted, "both answer"
        await until(lambda: world.calls.count(("try", way)) > 1)
        world.whole.add(way)
        await until(lambda: world.calls[-1][0] == "plan")
        ring_of(service).lose("attic")
        assert text_of(await answer_of(service)) == TEXT
        assert world.cut[-1] == frozenset()


async def test_without_a_plan_a_way_that_works_again_brings_the_board_back_that_was_left_out(
    service_of: MakeService, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "TRY_S", 0.01)
    world.leaves_out = {"cellar"}
    async with service_of(plan_options=None) as service:
        await answer_of(service)
        ring_of(service).lose(cut=("attic", "cellar"))
        assert text_of(await answer_of(service)) == TEXT
        assert ring_of(service).layers == {"attic": (0, 8)}
        world.whole.add(("attic", "cellar"))
        await until(lambda: len(world.rings) == 3)
        assert text_of(await answer_of(service)) == TEXT
        await settled()
        assert ring_of(service).layers.keys() == {"attic", "cellar"} and len(world.rings) == 3


@pytest.mark.parametrize("follows", [True, False], ids=["moves to new boards", "does not"])
async def test_a_text_goes_on_without_a_board_that_loses_packets(
    service_of: MakeService, world: World, monkeypatch: pytest.MonkeyPatch, follows: bool
) -> None:
    monkeypatch.setattr(losses, "FAILED_S", 0.05)
    world.is_held = True
    async with service_of(plan_options=None, moves=follows) as service:
        answer = await begun(service)
        world.is_held = False
        ring_of(service).lose_packets(Lossy("cellar", 0.1))
        assert text_of(await answer) == TEXT
        assert world.calls[2:5] == [("room", ("attic",), frozenset()), ("close",), ("open", ("attic",), None)]
        assert world.rings[0].abandoned == "cellar" and not world.doubted, "it answers"
        assert not any(call[0] == "greet" for call in world.calls)
        await until(lambda: world.heard_of == ["cellar"])
        if follows:
            await until(lambda: len(world.rings) == 3)
            assert ring_of(service).layers.keys() == {"attic", "cellar"}, "its link may have healed"


async def test_a_text_goes_around_a_way_that_loses_packets(service_of: MakeService, world: World) -> None:
    way = ("attic", "cellar")
    world.is_held = True
    async with service_of(plan_options=None) as service:
        answer = await begun(service)
        world.is_held = False
        ring_of(service).lose_packets(Lossy(way, 0.1))
        assert text_of(await answer) == TEXT
    assert world.cut == [frozenset(), {way}]


async def test_a_ring_that_loses_packets_stays_where_no_one_else_has_room(
    service_of: MakeService, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "FAILED_S", 0.02)
    world.is_held = True
    async with service_of(plan_options=None) as service:
        answer = await begun(service)
        world.failures["room"] = [PlacementError("too small")]
        ring_of(service).lose_packets(Lossy("cellar", 0.3))
        await until(lambda: ("room", ("attic",), frozenset()) in world.calls)
        await until(lambda: world.heard_of == ["cellar"])
        await settled()
        world.rings[0].gate.set()
        assert text_of(await answer) == TEXT
        await settled()
        assert len(world.rings) == 1 and world.rings[0].is_open and writer_of(service) is world.rings[0]


@pytest.mark.parametrize(("tokens_per_s", "moves"), [(0.9, True), (0.3, False)])
async def test_a_ring_that_loses_packets_stays_where_another_one_would_be_slower(
    service_of: MakeService, world: World, tokens_per_s: float, moves: bool
) -> None:
    """Two of three hops wait 25 ms for each chunk, of a trip of 50 ms: half of 1 token/s is left."""
    served = plan_of({"attic": (0, 4), "cellar": (4, 8)})
    world.is_held = True
    async with service_of() as service:
        answer = await begun(service)
        ring_of(service).plan = dataclasses.replace(served, trip_ms=50.0)
        world.is_held = False
        world.plan = dataclasses.replace(plan_of({"attic": (0, 8)}), tokens_per_s=tokens_per_s)
        ring_of(service).lose_packets(Lossy("cellar", 0.1))
        await until(lambda: ("plan", ("attic",)) in world.calls)
        await settled()
        world.rings[0].gate.set()
        assert text_of(await answer) == TEXT
        assert writer_of(service) is world.rings[int(moves)]


async def test_where_others_stand_by_for_a_board_that_loses_packets_nothing_is_planned(
    service_of: MakeService, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of({"attic": (0, 8)})
    monkeypatch.setattr(
        Standbys, "take_over", lambda standbys, found, cut: plan if world.rings and "cellar" not in found else None
    )
    world.is_held = True
    async with service_of() as service:
        answer = await begun(service)
        world.is_held = False
        ring_of(service).lose_packets(Lossy("cellar", 0.1))
        assert text_of(await answer) == TEXT
    assert world.calls[2:4] == [("close",), ("open", ("attic",), plan)]


async def test_of_the_origins_own_link_no_ring_can_do_without(
    service_of: MakeService, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async with service_of() as service:
        await answer_of(service)
        ring_of(service).lose_packets(Lossy("origin", 0.12))
        await settled()
        assert world.calls == OPENED and ring_of(service).is_open
    assert "this machine's own link loses 12 % of its packets" in caplog.text


async def test_a_doubted_board_serves_where_there_is_no_room_without_it(service_of: MakeService, world: World) -> None:
    world.failures["open"] = [
        *(RingLostError("node cellar: its disk is full", failed="cellar") for _ in range(2)),
        PlacementError("too small"),
    ]
    async with service_of() as service:
        assert text_of(await answer_of(service)) == TEXT
        opened = [call[1] for call in world.calls if call[0] == "open"]
        assert opened == [THREE[:2], THREE[:2], ("attic",), THREE[:2]]


async def test_a_board_that_comes_and_goes_is_not_used_at_once(service_of: MakeService, world: World) -> None:
    world.there = {"cellar"}
    async with service_of() as service:
        await answer_of(service)
        ring_of(service).lose("cellar")
        await until(lambda: world.heard_of == ["cellar"])
        await answer_of(service)
        ring_of(service).lose("cellar")
        await until(lambda: world.calls.count(("greet", "cellar")) == 2)
        await settled()
        assert text_of(await answer_of(service)) == TEXT
        assert ring_of(service).layers == {"attic": (0, 8)}


async def test_rings_that_are_lost_again_and_again_without_a_token_end_the_text(
    service_of: MakeService, world: World
) -> None:
    world.failures["open"] = [LinkLostError(f"peer cellar: lost {number}") for number in range(1, 100)]
    async with service_of() as service:
        with pytest.raises(StageFailedError, match=f"{MAX_LOSSES} rings in a row .* without a new token.*peer cellar"):
            await answer_of(service)
    assert len([call for call in world.calls if call[0] == "open"]) == MAX_LOSSES


async def test_a_bug_is_not_tried_again(service_of: MakeService, world: World) -> None:
    world.is_held = True
    async with service_of() as service:
        answer = await begun(service)
        ring_of(service).fail(StageFailedError("the origin failed, which is a bug"))
        with pytest.raises(StageFailedError, match="which is a bug"):
            await answer
        assert world.calls == OPENED


async def test_without_room_a_text_waits_for_a_board_and_says_so(service_of: MakeService, world: World) -> None:
    world.is_held = True
    async with service_of() as service:
        answer = await begun(service)
        world.is_held = False
        world.failures["open"] = [PlacementError("too small")]
        ring_of(service).lose("cellar")
        await until(lambda: not world.failures["open"])
        world.set("attic", "hall")
        pieces = await answer
        assert text_of(pieces) == TEXT
        assert notices_in(pieces) == ["waiting for boards: layers [4, 8) of cellar have no home: too small"]
        assert ring_of(service).layers == {"attic": (0, 4), "hall": (4, 8)}


async def test_of_several_texts_that_wait_one_tries(service_of: MakeService, world: World) -> None:
    world.is_held = True
    async with service_of() as service:
        answers = [await begun(service, text) for text in ("abc", "klm", "xyz")]
        world.is_held = False
        world.failures["open"] = [PlacementError("too small") for _ in range(100)]
        ring_of(service).lose("cellar")
        await until(lambda: len(world.failures["open"]) < 100)
        await settled()
        assert len(world.failures["open"]) == 99
        world.failures["open"].clear()
        world.set("attic", "hall")
        pieces = [await answer for answer in answers]
        assert [text_of(answer) for answer in pieces] == ["abc", "klm", "xyz"]
        assert [len(notices_in(answer)) for answer in pieces] == [1, 1, 1]


@pytest.mark.parametrize(("wait_s", "said"), [(0.0, "too small$"), (0.01, r"too small; no board came within 0.01 s")])
async def test_when_no_board_comes_the_text_ends_and_names_the_layers_without_a_home(
    service_of: MakeService, world: World, wait_s: float, said: str
) -> None:
    world.is_held = True
    async with service_of(wait_for_boards_s=wait_s) as service:
        answer = await begun(service)
        world.failures["open"] = [PlacementError("too small") for _ in range(100)]
        ring_of(service).lose("cellar")
        with pytest.raises(PlacementError, match=rf"layers \[4, 8\) of cellar have no home: {said}"):
            await answer


async def test_with_no_node_left_a_text_waits_too(service_of: MakeService, world: World) -> None:
    world.is_held = True
    async with service_of() as service:
        answer = await begun(service)
        world.is_held = False
        ring_of(service).lose("attic", "cellar")
        await until(lambda: ("close",) in world.calls)
        await settled()
        world.set("attic", "cellar", "hall")
        pieces = await answer
        assert text_of(pieces) == TEXT and ring_of(service).layers == {"hall": (0, 8)}
        (notice,) = notices_in(pieces)
        assert notice.endswith("no node is left; lost: attic, cellar")


async def test_a_text_that_waits_can_be_left(
    service_of: MakeService, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "RETRY_S", 0.1)
    world.is_held = True
    before = asyncio.all_tasks()
    async with service_of() as service:
        answer = await begun(service)
        world.failures["open"] = [PlacementError("too small") for _ in range(100)]
        ring_of(service).lose("cellar")
        await until(lambda: len(world.failures["open"]) < 100)
        answer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answer
        del world.failures["open"]
        world.is_held = False
        assert text_of(await answer_of(service)) == TEXT
    assert asyncio.all_tasks() == before


# ------------------------------------------------------------------ predictions


@pytest.mark.parametrize(("names_links", "outcome"), [(False, OUTCOME), (True, NAMED)])
async def test_the_last_piece_says_how_the_prediction_held(
    service_of: MakeService, world: World, names_links: bool, outcome: Outcome
) -> None:
    async with service_of(follows=False, names_links=names_links) as service:
        last = (await answer_of(service))[-1]
        assert last.statistics == {"num_rings": 1, "prediction": outcome.to_report()}
        assert (("explain", OUTCOME) in world.calls) is names_links


async def test_no_prediction_without_an_outcome(
    service_of: MakeService, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PretendedRing, "outcome", lambda ring, answer, statistics: None)
    async with service_of(follows=False, names_links=True) as service:
        assert prediction_in(await answer_of(service)) is None
    assert not [call for call in world.calls if call[0] == "explain"]


async def test_the_next_plan_knows_what_drafts_brought(
    service_of: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    brought = Outcome(10.0, 5.0, gain=0.2)
    monkeypatch.setattr(PretendedRing, "outcome", lambda ring, answer, statistics: brought)
    async with service_of(follows=False) as service:
        await answer_of(service)
    gain = load_draft_gain(BUNDLE.digest)
    assert gain.num_tokens == len(TEXT) and 0.2 < gain.factor < 1


# ----------------------------------------------------------------------- moving


async def test_a_new_board_moves_an_idle_ring_to_the_plan_that_uses_it(
    service_of: MakeService, world: World, reported: list[str]
) -> None:
    async with service_of() as service:
        await answer_of(service)
        world.plan = HALL
        world.set(*THREE)
        await until(lambda: len(world.rings) == 2)
        assert world.calls == [*OPENED, ("plan", THREE), ("close",), ("open", THREE, HALL)]
        assert reported == ["the ring has moved: attic [0, 3), cellar [3, 6), hall [6, 8)"]
        await settled()
        assert text_of(await answer_of(service)) == TEXT
        assert len(world.calls) == 5, "nothing new came"


async def test_a_ring_moves_only_when_no_text_is_written(service_of: MakeService, world: World) -> None:
    world.is_held = True
    async with service_of() as service:
        answers = [asyncio.create_task(answer_of(service)) for _ in range(2)]
        await until(lambda: service.ring is not None)
        world.plan = HALL
        world.set(*THREE)
        await until(lambda: ("plan", THREE) in world.calls)
        await settled()
        assert ring_of(service) is world.rings[0] and world.rings[0].is_open
        world.is_held = False
        world.rings[0].gate.set()
        assert [text_of(await answer) for answer in answers] == [TEXT, TEXT]
        await until(lambda: len(world.rings) == 2)
        assert world.calls[-2:] == [("close",), ("open", THREE, HALL)]
        assert writer_of(service) is world.rings[0] and ring_of(service) is world.rings[1]


async def test_at_once_texts_go_on_over_the_new_ring_where_they_were(service_of: MakeService, world: World) -> None:
    world.is_held = True
    async with service_of(moves_at_once=True) as service:
        answers = [asyncio.create_task(answer_of(service, text)) for text in ("abc", "xyz")]
        await until(lambda: service.ring is not None)
        world.is_held, world.plan = False, HALL
        world.set(*THREE)
        pieces = [await answer for answer in answers]
        assert [text_of(answer) for answer in pieces] == ["abc", "xyz"]
        for answer in pieces:
            assert [piece.token_ids for piece in answer] == [[1], [2], [3], []]
            assert answer[-1].statistics == {"num_rings": 2, "prediction": None}, "of which ring?"
        assert world.calls == [*OPENED, ("plan", THREE), ("close",), ("open", THREE, HALL)]
        assert writer_of(service) is ring_of(service) is world.rings[1]


async def test_a_text_that_its_user_leaves_no_longer_keeps_the_ring(service_of: MakeService, world: World) -> None:
    world.is_held = True
    async with service_of() as service:
        pieces = service.generate(TEXT, OPTIONS)
        assert (await anext(pieces)).text == "a"
        world.plan = HALL
        world.set(*THREE)
        await until(lambda: ("plan", THREE) in world.calls)
        await settled()
        assert len(world.rings) == 1
        await pieces.aclose()
        await until(lambda: len(world.rings) == 2)


@pytest.mark.parametrize(
    "plan",
    [
        plan_of({"attic": (0, 3), "cellar": (3, 8)}, is_kept=True),
        plan_of({"attic": (0, 4), "cellar": (4, 8)}),  # as it is served, in the nodes' own precision
    ],
    ids=["kept", "same layers"],
)
async def test_a_plan_that_changes_nothing_moves_nothing(service_of: MakeService, world: World, plan: Plan) -> None:
    async with service_of() as service:
        await answer_of(service)
        world.plan = plan
        world.set(*THREE)
        await until(lambda: ("plan", THREE) in world.calls)
        await settled()
        assert world.calls == [*OPENED, ("plan", THREE)]
        assert ring_of(service) is world.rings[0] and ring_of(service).is_open


async def test_the_same_layers_in_another_precision_are_another_plan(service_of: MakeService, world: World) -> None:
    async with service_of() as service:
        await answer_of(service)
        world.plan = plan_of({"attic": (0, 2), "cellar": (2, 8)}, precision="int8")
        world.set(*THREE)
        await until(lambda: len(world.rings) == 2)
        await settled()
        world.plan = plan_of({"attic": (0, 2), "cellar": (2, 8)}, precision="int4")
        world.set(*THREE, "zero")
        await until(lambda: len(world.rings) == 3)
        assert [stage.plan.precision for stage in ring_of(service).stages] == ["int4", "int4"]


async def test_with_equal_shares_a_new_board_is_reason_enough(service_of: MakeService, world: World) -> None:
    async with service_of(plan_options=None) as service:
        await answer_of(service)
        world.set(*THREE)
        await until(lambda: len(world.rings) == 2)
        assert world.calls == [*OPENED, ("close",), ("open", THREE, None)]
        world.set("attic", "cellar")
        await settled()
        assert len(world.rings) == 2, "a board that leaves breaks the ring or was not in it"


async def test_with_equal_shares_a_board_that_was_away_is_dealt_layers_anew(
    service_of: MakeService, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with service_of(plan_options=None) as service:
        await answer_of(service)
        for names in (("attic",), ("attic", "cellar")):
            world.set(*names)
            await settled()
        assert world.calls == OPENED
        monkeypatch.setattr(rebalancing, "REPLAN_S", 0.0)
        await answer_of(service)
        await until(lambda: len(world.rings) == 2)


async def test_a_ring_that_follows_nobody_stays(
    service_of: MakeService, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebalancing, "REPLAN_S", 0.0)
    async with service_of(follows=False) as service:
        await answer_of(service)
        world.plan = HALL
        world.set(*THREE)
        await answer_of(service)
        await settled()
        assert world.calls == OPENED


async def test_boards_are_asked_anew_when_a_text_ends_after_a_while(
    service_of: MakeService, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebalancing, "REPLAN_S", 0.0)
    async with service_of() as service:
        await answer_of(service)
        await until(lambda: ("plan", ("attic", "cellar")) in world.calls)


# ------------------------------------------------------------------- what fails


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (PlacementError("too small"), "the ring stays as it is, since it cannot be planned anew: too small"),
        (ZeroDivisionError("a bug"), "planning anew failed; please report this"),
    ],
    ids=["condition", "bug"],
)
async def test_a_plan_that_fails_leaves_the_ring_and_is_not_the_last(
    service_of: MakeService,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    text: str,
) -> None:
    world.failures["plan"] = [error]
    async with service_of() as service:
        await answer_of(service)
        world.plan = HALL
        world.set(*THREE)
        await until(lambda: text in caplog.text)
        await settled()
        assert world.calls == [*OPENED, ("plan", THREE)] and ring_of(service).is_open
        monkeypatch.setattr(rebalancing, "REPLAN_S", 0.0)
        await answer_of(service)
        await until(lambda: len(world.rings) == 2)
        assert world.calls[3:] == [("plan", THREE), ("close",), ("open", THREE, HALL)]


async def test_a_ring_that_cannot_be_moved_is_opened_without_the_boards_that_were_to_join(
    service_of: MakeService, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async with service_of() as service:
        await answer_of(service)
        world.failures["open"] = [NodeUnavailableError("hall: its disk is full")]
        world.plan = plan_of({"attic": (0, 4), "hall": (4, 8)})
        world.set(*THREE, "zero")
        await until(lambda: "cannot be moved: hall: its disk is full" in caplog.text)
        await settled()
        assert service.ring is None
        del world.calls[:]
        assert text_of(await answer_of(service)) == TEXT
        assert world.calls == [("open", ("attic", "cellar", "zero"), None)], "zero was not to serve"


async def test_a_board_that_left_and_came_back_is_tried_again(
    service_of: MakeService, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async with service_of() as service:
        await answer_of(service)
        world.failures["open"] = [NodeUnavailableError("hall: its disk is full")]
        world.plan = HALL
        world.set(*THREE)
        await until(lambda: "cannot be moved" in caplog.text)
        await answer_of(service)
        await settled()
        assert world.rings[-1].layers == {"attic": (0, 4), "cellar": (4, 8)}
        world.set("attic", "cellar")
        await settled()
        world.set(*THREE)
        await until(lambda: len(world.rings[-1].stages) == 3)


async def test_where_the_others_cannot_serve_all_boards_are_tried(
    service_of: MakeService, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async with service_of() as service:
        await answer_of(service)
        world.failures["open"] = [NodeUnavailableError("hall: its disk is full"), PlacementError("too small")]
        world.plan = HALL
        world.set(*THREE)
        await until(lambda: "cannot be moved" in caplog.text)
        del world.calls[:]
        assert text_of(await answer_of(service)) == TEXT
        assert world.calls == [("open", ("attic", "cellar"), None), ("open", THREE, None)]
        world.set(*THREE, "zero")
        await until(lambda: ("plan", (*THREE, "zero")) in world.calls)
    assert "all boards are tried, since no ring can be opened with those that served: too small" in caplog.text


async def test_a_plan_for_a_ring_that_was_lost_meanwhile_moves_nothing(
    service_of: MakeService, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_layers = world.plan_layers

    async def lose_and_plan(*arguments: Any) -> Plan:
        world.rings[-1].lose("cellar")
        return await plan_layers(*arguments)

    monkeypatch.setattr(upkeep, "plan_layers", lose_and_plan)
    async with service_of() as service:
        await answer_of(service)
        world.plan = HALL
        world.set(*THREE)
        await until(lambda: ("plan", THREE) in world.calls)
        await settled()
        assert world.calls == [*OPENED, ("plan", THREE), ("greet", "cellar")]


async def test_a_ring_that_is_lost_before_it_moves_is_opened_without_whom_it_lost(
    service_of: MakeService, world: World
) -> None:
    world.is_held = True
    async with service_of() as service:
        answer = await begun(service)
        world.plan = HALL
        world.set(*THREE)
        await until(lambda: ("plan", THREE) in world.calls)
        await settled()
        world.is_held = False
        ring_of(service).lose("cellar")
        assert text_of(await answer) == TEXT
        assert ring_of(service).layers == {"attic": (0, 4), "hall": (4, 8)}


# ---------------------------------------------------------------------- closing


async def test_closing_ends_a_plan_under_way_and_closes_the_ring(
    service_of: MakeService, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_planning, ended = asyncio.Event(), []

    async def plan_forever(*arguments: Any) -> None:
        is_planning.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("plan")

    monkeypatch.setattr(upkeep, "plan_layers", plan_forever)
    before = asyncio.all_tasks()
    async with service_of() as service:
        await answer_of(service)
        world.set(*THREE)
        async with asyncio.timeout(5):
            await is_planning.wait()
    assert ended == ["plan"]
    assert world.calls == [*OPENED, ("close",)]
    assert asyncio.all_tasks() == before


async def test_closing_stops_the_timer(service_of: MakeService, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebalancing, "SETTLE_S", 0.01)
    async with service_of() as service:
        await answer_of(service)
        world.plan = HALL
        world.set(*THREE)
        await settled()
    await asyncio.sleep(0.03)  # the timer would have fired
    assert world.calls == [*OPENED, ("close",)]


async def test_a_service_that_never_answered_closes_too(service_of: MakeService, world: World) -> None:
    async with service_of():
        pass
    assert world.calls == []
