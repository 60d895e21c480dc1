"""A ring whose links and boards fail: what ``Ring`` and ``StageHost`` do about it, without sockets."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

from flowspec_edge.bench.simulated_ring import SimulatedRing, Watcher
from flowspec_edge.core import events as ev
from flowspec_edge.core.limits import CREDITS_PER_HOP
from flowspec_edge.core.planning.losses import Part, Way, way_between
from flowspec_edge.core.speculation.generation import TargetLimits
from flowspec_edge.core.speculation.origin import Origin
from flowspec_edge.core.speculation.stage import Stage
from flowspec_edge.errors import FlowspecError
from tests.fakes import EOS, VOCAB, FakeDrafter, FakeOrigin, FakeStage, NoTime
from tests.interleavings.order import Callback, Order

HEARTBEAT_MS = 1750.0
"""After this long whoever still hears nothing on a control link takes it for lost."""
LOSS_MS = 750.0
"""How long an origin that lost a link waits for its nodes to say that they are there."""
LINGER_MS = 2000.0
"""How long a stage that failed keeps its links, so that the origin hears its reason first."""
ORIGIN, ORIGIN_NAME = -1, "origin"
"""The number of the origin, where ends of links are named by stage."""


class OnEvent(Protocol):
    """Who waits for a session's actions."""

    def __call__(self, ring: FailingRing, session: int, action: ev.OriginAction, /) -> None: ...


class Links:
    """The scheduler of one ring: a message passes as long as its link does.

    A link has two lanes, one in each direction. ``control i`` and ``reply i`` are that of the origin and stage i;
    ``hop i`` and ``credit i`` are that of stage i and whoever is before it, behind the last stage the origin.
    """

    def __init__(self, order: Order, ring: int) -> None:
        self._order, self._ring = order, ring
        self._ended: set[str] = set()
        self._silent: set[str] = set()  # nothing more is sent on these lanes

    @property
    def now_s(self) -> float:
        return self._order.now_s

    def lane(self, name: str) -> Hashable:
        return self._ring, name

    def after(self, delay_ms: float, lane: str | None, callback: Callback) -> None:
        if lane is None or lane not in self._silent:
            self._order.after(delay_ms, None if lane is None else self.lane(lane), callback)

    def silence(self, *lanes: str) -> None:
        """Nothing more is sent on these lanes."""
        self._silent.update(lanes)

    def has_ended(self, lane: str) -> bool:
        return lane in self._ended

    def end(self, lane: str, on_end: Callback | None, *, is_reset: bool = False) -> bool:
        """The lane has ended, and ``on_end`` is the last thing on it. False where it had ended before.

        Where it ``is_reset``, what is on its way is lost.
        """
        if lane in self._ended:
            return False
        self._ended.add(lane)
        self._silent.add(lane)
        if is_reset:
            self._order.clear(self.lane(lane))
        if on_end is not None:
            self._order.after_all(self.lane(lane), on_end)
        return True


class FailingRing(SimulatedRing, Watcher):
    """A ring over ``boards``, of which each serves a stage.

    ``on_action`` is told what texts wait for, ``on_loss`` that the ring is lost: why, who does not answer any more, and
    the board that answers and failed.
    """

    def __init__(
        self,
        number: int,
        boards: Sequence[str],
        order: Order,
        rng: random.Random,
        *,
        max_context: int,
        skill: float,
        taps: tuple[int, ...],
        on_action: OnEvent,
        on_loss: Callable[[FailingRing, str, frozenset[Part], str | None], None],
    ) -> None:
        self.boards = boards
        self.links = Links(order, number)
        limits = TargetLimits(max_context, VOCAB, frozenset({EOS}), hidden_size=0 if taps else 1)
        owned: list[list[int]] = [[] for _ in boards]
        for tap in taps:
            rng.choice(owned).append(tap)
        self.fakes = [FakeStage(rng, is_first=i == 0, taps=tuple(owned[i])) for i in range(len(boards))]
        self.engine = FakeOrigin(FakeDrafter(rng, skill, taps))
        origin = Origin(num_stages=len(boards), limits=limits, has_drafter=True, taps=taps)
        super().__init__(origin, self.engine, self.fakes, self.links, NoTime(), [self])
        last = len(boards) - 1
        self.stages = [
            Stage(is_last=i == last, embeds=i == 0, vocab_size=VOCAB, hidden_size=1) for i in range(len(boards))
        ]
        self.is_serving = [True] * len(boards)
        self.is_open = True
        """False once something in the ring was lost, or it was left."""
        self.has_ended = False
        """Set when its texts have heard that it is lost, and when it is left."""
        self._has_raised = False
        self._order, self._on_action, self._on_loss = order, on_action, on_loss
        self._frozen: dict[int, list[Callback]] = {}
        self._cut: Way | None = None  # what a stage, or the origin, says of its neighbour
        self._cause: str | None = None
        self._failed: str | None = None

    # ------------------------------------------------------------------- the two shells

    def tell_origin(self, event: ev.OriginEvent) -> None:
        if isinstance(event, ev.PromptSubmitted):  # a RequestError is the request's
            super().tell_origin(event)
            return
        if self._has_raised and not isinstance(event, ev.RingLost | ev.GenerationCancelled):
            return  # what it answered when it raised is lost, and the ring's readers and timer have ended
        try:
            super().tell_origin(event)
        except FlowspecError as cause:
            self._has_raised = True
            self._lose(str(cause))

    def see_action(self, action: ev.OriginAction, now_s: float) -> None:
        match action:
            case ev.FinishGeneration(session, _, error):
                if error is not None and self._cause is None:  # a ring that failed once is not trusted again
                    self._cause, self.is_open, self.has_ended = error, False, True
                    self._on_loss(self, error, frozenset(), None)
                self._on_action(self, session, action)
            case ev.EmitTokens(session):
                self._on_action(self, session, action)

    def leave(self) -> None:
        """End what runs without a last token: another ring goes on with it."""
        self.is_open, self.has_ended = False, True
        for session in list(self.engine.prompts):
            self.tell_origin(ev.GenerationCancelled(session))

    def close(self) -> None:
        """The origin closes its links; each stage ends when it sees that."""
        self.is_open, self.is_left, self.has_ended = False, True, True
        for number in range(len(self.boards)):
            self.links.end(f"control {number}", functools.partial(self._hear_end, number, f"control {number}"))
        self.links.silence("hop 0", f"credit {len(self.boards)}")

    def _tell_stage(self, number: int, event: ev.StageEvent) -> None:
        if number in self._frozen:
            self._frozen[number].append(functools.partial(self._tell_stage, number, event))
            return
        if not self.is_serving[number]:
            return
        try:
            super()._tell_stage(number, event)
        except FlowspecError as cause:
            self.fail_stage(number, str(cause))

    def _end_forward(self, number: int, end: int) -> None:
        if number in self._frozen:
            self._frozen[number].append(functools.partial(self._end_forward, number, end))
        elif self.is_serving[number]:
            super()._end_forward(number, end)

    def _lose(self, cause: str, failed: str | None = None, cut: Way | None = None) -> None:
        """Something in the ring is lost; soon it is known who."""
        if self._cause is None and not self.is_left:
            self._cause, self._failed, self._cut, self.is_open = cause, failed, cut, False
            self._order.after(LOSS_MS, None, self._give_up)

    def _give_up(self) -> None:
        cause, silent = self._cause, {board for board in self.boards if not self._answers(board)}
        lost: frozenset[Part] = frozenset(silent) or frozenset([self._cut] if self._cut is not None else [])
        if not self.is_left and cause is not None:
            self._on_loss(self, cause, lost, None if lost else self._failed)
            self.tell_origin(ev.RingLost(cause))
        self.has_ended = True

    def _answers(self, board: str) -> bool:
        """Whether a board that is asked over its control link says that it is there."""
        number = self.boards.index(board)
        has_link = not any(map(self.links.has_ended, (f"control {number}", f"reply {number}")))
        return has_link and number not in self._frozen

    def _end_stage(self, number: int) -> None:
        """The stage's host ends, and its caches with it."""
        self.is_serving[number] = False
        self.running[number] = None
        self.fakes[number].caches.clear()
        self.links.silence(f"reply {number}", f"credit {number}", f"hop {number + 1}")

    def _hear_end(self, number: int, link: str) -> None:
        """A stage, or the origin, sees that a link has ended."""
        if number in self._frozen:
            self._frozen[number].append(functools.partial(self._hear_end, number, link))
        elif number == ORIGIN:
            self._lose(f"{link}: link lost", cut=self._way(link))
        elif link.startswith("control") and self.is_serving[number]:
            self.lose_board(self.boards[number], is_seen=True, is_reset=False)
        elif self.is_serving[number]:
            self.fail_stage(number, f"{link}: link lost", self._way(link))

    # ------------------------------------------------------------------------ what fails

    def fail_stage(self, number: int, reason: str, cut: Way | None = None) -> None:
        """A stage cannot go on, and tells the origin why: it failed, or lost a neighbour."""
        if self.is_serving[number]:
            board = self.boards[number]
            tell = functools.partial(self._lose, f"{board}: {reason}", None if cut is not None else board, cut)
            self.links.after(0.0, f"reply {number}", tell)
            self._end_stage(number)
            leave = functools.partial(self.lose_board, self.boards[number], is_seen=True, is_reset=False)
            self._order.after(LINGER_MS, None, leave)

    def lose_link(self, link: str, *, seen_by_far: bool, seen_by_near: bool, is_reset: bool) -> None:
        """``control i`` or ``hop i`` is lost; its near end is the one that comes first on the ring.

        Whoever does not see it believes in the link on, control links apart, which have a heartbeat. Where the link
        ``is_reset``, what is on its way is lost too.
        """
        forth, back = self._lanes(link)
        near, far = self._ends_of(link)
        for lane, end, is_seen in ((forth, far, seen_by_far), (back, near, seen_by_near)):
            hear = functools.partial(self._hear_end, end, link)
            is_news = self.links.end(lane, hear if is_seen else None, is_reset=is_reset or not is_seen)
            if is_news and not is_seen and link.startswith("control"):
                self._order.after(HEARTBEAT_MS, None, hear)

    def lose_board(self, board: str, *, is_seen: bool, is_reset: bool) -> None:
        """A board of this ring is gone, as a process or with its power, and its links with it."""
        number = self.boards.index(board)
        self._frozen.pop(number, None)
        self._end_stage(number)
        for link in self.links_of(board):
            is_near = self._ends_of(link)[0] == number
            self.lose_link(
                link, seen_by_far=is_seen and is_near, seen_by_near=is_seen and not is_near, is_reset=is_reset
            )

    def freeze(self, board: str) -> None:
        """Nothing happens on the board, though its system keeps the links; only its heartbeat is missed."""
        number = self.boards.index(board)
        if number not in self._frozen:
            self._frozen[number] = []
            waiting = self._frozen[number]
            self._order.after(HEARTBEAT_MS, None, functools.partial(self._miss, number, waiting))

    def thaw(self, board: str) -> None:
        for callback in self._frozen.pop(self.boards.index(board), ()):
            callback()

    def links_of(self, board: str) -> list[str]:
        number = self.boards.index(board)
        return [f"control {number}", f"hop {number}", f"hop {number + 1}"]

    def _miss(self, number: int, waiting: list[Callback]) -> None:
        if self._frozen.get(number) is waiting:
            self._hear_end(ORIGIN, f"control {number}")

    def _way(self, link: str) -> Way | None:
        """The way of a data link."""
        names = [ORIGIN_NAME if end == ORIGIN else self.boards[end] for end in self._ends_of(link)]
        return way_between(*names) if link.startswith("hop") else None

    def _lanes(self, link: str) -> tuple[str, str]:
        kind, number = link.split()
        return link, f"{'reply' if kind == 'control' else 'credit'} {number}"

    def _ends_of(self, link: str) -> tuple[int, int]:
        kind, text = link.split()
        number = int(text)
        last = len(self.boards)
        return ORIGIN if kind == "control" else number - 1, ORIGIN if number == last else number

    # --------------------------------------------------------------------------- the end

    def check_rest(self, *, has_credits: bool) -> None:
        """No session has left anything behind, in an open ring where nothing is on its way."""
        self.check()
        assert not self.engine.drafter.paths, "the drafter keeps a session"
        if not self.is_open:
            return
        for number, stage in enumerate(self.stages):
            assert not stage._sessions and not stage._waiting and stage._running is None, f"stage {number} keeps some"
            assert not self.fakes[number].caches
        if has_credits:
            cores: list[Origin | Stage] = [self.origin, *self.stages]
            assert all(core._credits == CREDITS_PER_HOP for core in cores), "a credit was lost"

    def check_closed(self) -> None:
        """Every stage has ended, and frees what it held."""
        assert not any(self.is_serving), "a stage goes on without its origin"
        assert not any(fake.caches for fake in self.fakes) and not self.engine.drafter.paths
