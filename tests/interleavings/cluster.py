"""Boards that come and go, and a service that writes texts over them: what ``GenerationService`` does, as the cores
decide it, without sockets."""

from __future__ import annotations

import functools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from flowspec_edge.config import GenerateOptions
from flowspec_edge.core import events as ev
from flowspec_edge.core.cluster import membership as ms
from flowspec_edge.core.cluster.address import Address
from flowspec_edge.core.planning import losses as ls
from flowspec_edge.core.planning import rebalancing as rb
from flowspec_edge.core.planning import recovery as rc
from flowspec_edge.core.planning.detours import around_cut_ways
from flowspec_edge.core.planning.placement import NodeOffer
from flowspec_edge.errors import RequestError
from tests.fakes import unsplit
from tests.interleavings.failing_ring import LOSS_MS, ORIGIN_NAME, FailingRing
from tests.interleavings.order import Order

CONNECT_MS = 1500.0
"""How long whoever connects to a board waits that does not answer."""
SILENT = ms.Failure(ms.TIMED_OUT, "timed out")


@dataclass(slots=True)
class Board:
    """``num_starts`` tells one life of its process from the next."""

    name: str
    address: Address
    is_up: bool = False
    is_frozen: bool = False
    num_starts: int = 0

    @property
    def answers(self) -> bool:
        return self.is_up and not self.is_frozen


@dataclass(slots=True)
class Text:
    """One text, as its client sees it. ``end`` is why it ended; ``error`` the named error, where that was why."""

    number: int
    prompt: tuple[int, ...]
    options: GenerateOptions
    recovery: rc.Recovery
    expected: list[int]
    """What the unsplit model writes; nothing where the request is refused."""
    tokens: list[int] = field(default_factory=list)
    end: str | None = None
    error: str | None = None
    ring: FailingRing | None = None
    session: int = 0
    num_rings: int = 0
    num_losses: int = 0
    """How many rings it has lost in a row without a new token."""
    num_tokens_then: int = 0
    missing_since: float | None = None
    """Since when there is no room for it, whatever was tried."""
    is_judged: bool = False


class Cluster:
    """Boards, what their origin knows of them, and its texts.

    A ring needs ``num_needed`` boards, and uses as many more as are there. ``build_ring`` makes one over boards.
    """

    def __init__(
        self,
        order: Order,
        rng: random.Random,
        build_ring: Callable[..., FailingRing],
        *,
        num_boards: int,
        num_needed: int,
        wait_s: float,
        at_once: bool,
        max_context: int,
    ) -> None:
        self.order, self.tally = order, Counter[str]()
        self.texts: list[Text] = []
        self.rings: list[FailingRing] = []
        self.ring: FailingRing | None = None
        self.num_strikes = 0
        self.causes: list[str] = []
        """Why rings were lost."""
        self.boards: dict[str, Board] = {}
        self._rng, self._build_ring = rng, build_ring
        self._num_needed, self._wait_s, self.max_context = num_needed, wait_s, max_context
        self._directory = ms.Membership("origin", "home", "key", 0.0)
        self._lost = ls.Losses(ORIGIN_NAME)
        self._core = rb.Rebalancing(at_once=at_once)
        self._dealt: frozenset[str] = frozenset()
        self._asking: list[Text] = []  # these wait for a ring
        self._waiting: list[Text] = []  # these wait for boards
        self._is_opening = self._is_moving = self._is_closed = False
        self._had_room = self._is_lossy = False
        self._enough_since = math.inf  # since when as many boards answer as are needed
        for _ in range(num_boards):
            self.add_board()
        while len(self._directory.peers) < num_boards:
            order.step()

    # ----------------------------------------------------------------------------- boards

    def add_board(self) -> None:
        """A new board is switched on."""
        number = len(self.boards)
        board = Board(f"pi-{number}", Address(f"10.0.0.{number + 1}", 7361))
        self.boards[board.name] = board
        self.start(board)

    def start(self, board: Board) -> None:
        """A board is there, or there again, and announces itself."""
        board.is_up, board.is_frozen = True, False
        board.num_starts += 1
        self._count_boards()
        record = ms.RecordHeard(board.name, board.name, (board.address,), "home", "key", "1")
        self.order.after(0.0, "mDNS", functools.partial(self._tell_directory, record))

    def stop(self, board: Board, *, is_seen: bool, is_reset: bool) -> None:
        """A board's process ends, or where that ``is_seen`` by nobody, its power."""
        if board.is_up:
            board.is_up = board.is_frozen = False
            self._count_boards()
            for ring in self._rings_of(board):
                ring.lose_board(board.name, is_seen=is_seen, is_reset=is_reset)

    def freeze(self, board: Board) -> None:
        if board.answers:
            board.is_frozen = True
            self._count_boards()
            for ring in self._rings_of(board):
                ring.freeze(board.name)

    def thaw(self, board: Board) -> None:
        if board.is_frozen:
            board.is_frozen = False
            self._count_boards()
            for ring in self._rings_of(board):
                ring.thaw(board.name)

    @property
    def has_open_ring(self) -> bool:
        return self.ring is not None and self.ring.is_open

    @property
    def num_answering(self) -> int:
        return sum(board.answers for board in self.boards.values())

    def has_had_enough(self, for_s: float) -> bool:
        """Whether enough boards have answered for so long."""
        return self.order.now_s - self._enough_since >= for_s

    def _count_boards(self) -> None:
        if self.num_answering < self._num_needed:
            self._enough_since = math.inf
        elif self._enough_since == math.inf:
            self._enough_since = self.order.now_s

    def _rings_of(self, board: Board) -> list[FailingRing]:
        return [ring for ring in self.rings if board.name in ring.boards and any(ring.is_serving)]

    # ---------------------------------------------------------------- what is known of them

    def _tell_directory(self, event: ms.MembershipEvent) -> None:
        if self._is_closed:
            return
        for action in self._directory.handle(event, self.order.now_s):
            match action:
                case ms.GreetPeer(address):
                    self._ask([self._board_at(address)], functools.partial(self._take_greeting, address))
                case ms.ReportJoined() | ms.ReportLost():
                    self._wake()
                    self._report_boards()
        self._directory.check()
        self._arm(self._directory, functools.partial(self._tell_directory, ms.TimePassed()))

    def _take_greeting(self, address: Address, is_there: bool) -> None:
        peer = ms.Peer(self._board_at(address).name, address, "1", 0)
        self._tell_directory(ms.PeerAnswered(address, peer) if is_there else ms.PeerFailed(address, SILENT))

    def _tell_lost(self, event: ls.LossEvent) -> None:
        if self._is_closed:
            return
        for action in self._lost.handle(event, self.order.now_s):
            match action:
                case ls.TryPart(part):
                    self._ask(self._boards_of(part), functools.partial(self._take_answer, part))
                case ls.UsePart(str() as node) if node in self.boards:
                    self.tally["nodes used again"] += 1
                    self._tell_directory(ms.AddressLearned(self.boards[node].address, ms.REMEMBERED))
                    self._wake()
                    self._report_boards()
                case ls.UsePart():
                    self.tally["ways used again"] += 1
                    self._wake()
                    self._tell(rb.WayReturned())
        self._lost.check()
        self._arm(self._lost, functools.partial(self._tell_lost, ls.TimePassed()))

    def _take_answer(self, part: ls.Part, is_there: bool) -> None:
        self._tell_lost(ls.PartAnswered(part) if is_there else ls.PartSilent(part))

    def _boards_of(self, part: ls.Part) -> list[Board]:
        return [self.boards[node] for node in ([part] if isinstance(part, str) else part) if node in self.boards]

    def _ask(self, boards: Sequence[Board], on_answer: Callable[[bool], None]) -> None:
        """A greeting on its way: the boards answer, or nobody does for a while."""

        def arrive() -> None:
            if all(board.answers for board in boards):
                self.order.after(0.0, None, functools.partial(on_answer, True))
            else:
                self.order.after(CONNECT_MS, None, functools.partial(on_answer, False))

        self.order.after(0.0, None, arrive)

    def _board_at(self, address: Address) -> Board:
        return next(board for board in self.boards.values() if board.address == address)

    def _lose(self, parts: frozenset[ls.Part]) -> None:
        for part in parts:
            if isinstance(part, str):
                self._tell_directory(ms.PeerDoubted(part))
        self._tell_lost(ls.PartsLost(parts))
        self._report_boards()

    def lose_packets(self, part: ls.Part) -> None:
        """The ring has found a part of it that answers, and loses packets."""
        self._is_lossy = True
        self._tell_lost(ls.PacketsLost(part))
        self._report_boards()
        self._tell(rb.PacketsLost())

    def _arm(self, core: ms.Membership | ls.Losses | rb.Rebalancing, tell: Callable[[], None]) -> None:
        """Tell the core that time has passed when that is due, unless its deadline has moved."""
        deadline = core.next_deadline()
        if deadline is not None:
            delay_ms = max(deadline - self.order.now_s, 0.0) * 1000 + 0.001
            self.order.after(delay_ms, None, lambda: tell() if core.next_deadline() == deadline else None)

    @property
    def _usable(self) -> frozenset[str]:
        return frozenset(self._directory.peers) - self._lost.nodes

    def _planned(self) -> list[str]:
        """The boards of the next ring: those of which nothing is doubted, and where they are too few, all that answer.

        No two neighbours are cut off from each other.
        """
        doubted = self._lost.doubted
        answering = self._usable | {node for node in self._directory.peers if node in doubted}
        for boards, ways in (
            (self._usable, self._lost.ways),
            (answering, frozenset(way for way in self._lost.ways if way not in doubted)),
        ):
            names = sorted(boards)
            self._rng.shuffle(names)
            offers = [NodeOffer(name, 2**30) for name in names]
            planned = [offer.node for offer in around_cut_ways(offers, ways, ORIGIN_NAME)]
            if len(planned) >= self._num_needed:
                break
        return planned

    # ------------------------------------------------------------------------------ texts

    def submit(self, prompt: tuple[int, ...], options: GenerateOptions) -> None:
        expected = unsplit(prompt, options, self.max_context)
        text = Text(len(self.texts), prompt, options, rc.Recovery(self._wait_s), expected)
        self.texts.append(text)
        self._tell(rb.SessionBegan())
        self._ask_for_ring(text)

    def cancel(self, text: Text) -> None:
        """Its client has left."""
        if text.end is None:
            self._end(text, "cancelled")
            if text.ring is not None:
                text.ring.tell_origin(ev.GenerationCancelled(text.session))

    def _end(self, text: Text, why: str, error: str | None = None) -> None:
        text.end, text.error = why, error
        for waiting in (self._asking, self._waiting):
            if text in waiting:
                waiting.remove(text)
        self._tell(rb.SessionEnded())

    def _decide(self, text: Text, event: rc.RecoveryEvent) -> None:
        self._count(text, event)
        actions = text.recovery.handle(event, self.order.now_s)
        text.recovery.check()
        for action in actions:
            match action:
                case rc.OpenRing():
                    self._ask_for_ring(text)
                case rc.WaitForBoards(until):
                    self.tally["waits for boards"] += 1
                    self._waiting.append(text)
                    delay_ms = max(until - self.order.now_s, 0.0) * 1000 + 0.001
                    self.order.after(delay_ms, None, functools.partial(self._stop_waiting, text))
                case rc.GiveUp(reason):
                    self._end(text, "failed", reason)

    def _count(self, text: Text, event: rc.RecoveryEvent) -> None:
        match event:
            case rc.RingOpened():
                text.missing_since = None
            case rc.RingFailed():
                text.num_losses = text.num_losses + 1 if len(text.tokens) == text.num_tokens_then else 1
                text.num_tokens_then = len(text.tokens)
            case rc.RoomMissing() if text.missing_since is None:
                text.missing_since = self.order.now_s

    def _stop_waiting(self, text: Text) -> None:
        if text in self._waiting:
            self._waiting.remove(text)
            self._ask_for_ring(text)

    def _wake(self) -> None:
        """Boards have come or left: let texts that wait for them try again."""
        for text in list(self._waiting):
            self._stop_waiting(text)

    def _take(self, text: Text, ring: FailingRing, session: int, action: ev.OriginAction) -> None:
        """What a ring says of a text reaches whoever reads it."""
        if text.end is not None or (text.ring, text.session) != (ring, session):
            return
        match action:
            case ev.EmitTokens(_, tokens):
                text.tokens += tokens
            case ev.FinishGeneration(_, "failed", error):
                text.ring = None
                self._decide(text, rc.RingFailed(len(text.prompt) + len(text.tokens), error or ""))
            case ev.FinishGeneration(_, "cancelled"):
                text.ring = None
                self.tally["texts moved"] += 1
                self._ask_for_ring(text)
            case ev.FinishGeneration(_, reason):
                self._end(text, reason)

    # ------------------------------------------------------------------------------ rings

    def _ask_for_ring(self, text: Text) -> None:
        self._asking.append(text)
        self._serve_asking()

    def _serve_asking(self) -> None:
        if self._is_opening or not self._asking:
            return
        if self.ring is None or not self.ring.is_open:
            self._open_soon(is_moving=False)
            return
        asking, self._asking = self._asking, []
        for text in asking:
            self._decide(text, rc.RingOpened())
            text.num_rings += 1
            text.ring, text.session = self.ring, len(self.ring.engine.prompts) + 1
            prompt = (*text.prompt, *text.tokens)
            options = replace(text.options, max_new_tokens=text.options.max_new_tokens - len(text.tokens))
            self.ring.engine.prompts[text.session] = prompt
            try:
                self.ring.tell_origin(ev.PromptSubmitted(text.session, prompt, options))
            except RequestError as refused:
                self._end(text, "refused", str(refused))

    def _open_soon(self, *, is_moving: bool) -> None:
        """Open a ring, when it is known who is lost of the one before."""
        self._is_opening, self._is_moving = True, is_moving
        if self.ring is None or self.ring.has_ended:
            self.order.after(0.0, None, self._open)
        else:
            self.order.after(LOSS_MS, None, functools.partial(self._open_soon, is_moving=is_moving))

    def _open(self) -> None:
        """Connect to all boards that are to serve; what they answer decides."""
        self._close_ring()
        boards = self._planned()
        if len(boards) < self._num_needed:
            self._end_opening(rc.RoomMissing(f"{len(boards)} boards have no room for all layers", self._had_room))
            return
        answers: dict[str, bool] = {}
        starts = {board: self.boards[board].num_starts for board in boards}

        def take(board: str, is_there: bool) -> None:
            answers[board] = is_there
            if len(answers) == len(boards):
                self._end_connecting(boards, starts, answers)

        for board in boards:
            self._ask([self.boards[board]], functools.partial(take, board))

    def _end_connecting(self, boards: list[str], starts: dict[str, int], answers: dict[str, bool]) -> None:
        if self._is_closed:
            return
        gone = frozenset(board for board in boards if not answers[board] or not self.boards[board].is_up)
        anew = [board for board in boards if self.boards[board].num_starts != starts[board]]
        if gone or anew:
            self.tally["openings failed"] += 1
            self._lose(frozenset([*gone, *anew]))
            self._end_opening(rc.RingFailed(0, f"{', '.join(sorted(gone) or anew)}: link lost while a ring opened"))
            return
        ring = self._build_ring(
            len(self.rings), boards, self.order, self._rng, on_action=self._hear, on_loss=self._mourn
        )
        self.rings.append(ring)
        self.ring, self._had_room, self._dealt = ring, True, frozenset(boards)
        for board in boards:
            if self.boards[board].is_frozen:
                ring.freeze(board)
        self._tell(rb.RingOpened(self._usable))
        self._end_opening(None)

    def _end_opening(self, event: rc.RecoveryEvent | None) -> None:
        """Where it failed, the first of those who asked hears it, and the others try themselves.

        Where a ring was to move, nobody asked yet.
        """
        is_asked, self._is_opening = not self._is_moving, False
        if event is not None and is_asked and self._asking:
            text = self._asking.pop(0)
            if isinstance(event, rc.RingFailed):
                event = replace(event, num_tokens=len(text.prompt) + len(text.tokens))
            self._decide(text, event)
        self._serve_asking()

    def _close_ring(self) -> None:
        if self.ring is not None:
            self.ring.close()
            self.ring = None
            self._tell(rb.RingClosed())

    def _hear(self, ring: FailingRing, session: int, action: ev.OriginAction) -> None:
        for text in self.texts:
            if (text.ring, text.session) == (ring, session):
                lane = ("text", text.number)
                self.order.after(0.0, lane, functools.partial(self._take, text, ring, session, action))

    def _mourn(self, ring: FailingRing, cause: str, lost: frozenset[ls.Part], failed: str | None) -> None:
        self.tally["rings lost"] += 1
        self.causes.append(cause)
        if failed is not None:
            self._tell_lost(ls.StageFailed(failed))
        self._lose(lost)

    # ----------------------------------------------------------------------------- moving

    def _tell(self, event: rb.RebalancingEvent) -> None:
        for action in self._core.handle(event, self.order.now_s):
            match action:
                case rb.MakePlan():
                    self.order.after(0.0, None, functools.partial(self._plan, self.ring))
                case rb.MoveRing():
                    self.order.after(0.0, None, self._move)
        self._core.check()
        if not self._is_closed:
            self._arm(self._core, functools.partial(self._tell, rb.TimePassed()))

    def _plan(self, ring: FailingRing | None) -> None:
        """A plan is better where there are more boards, mostly where packets are lost, and now and then where some got
        hot.
        """
        is_same = ring is self.ring and ring is not None and ring.is_open
        chance, self._is_lossy = 0.7 if self._is_lossy else 0.3, False
        is_better = is_same and (bool(self._usable - self._dealt) or self._rng.random() < chance)
        self._tell(rb.PlanMade(self._usable, is_better, self._usable))

    def _move(self) -> None:
        if self._is_opening:  # one opening at a time
            self.order.after(100.0, None, self._move)
            return
        if self.ring is not None and self.ring.is_open:
            self.tally["rings moved"] += 1
            self.ring.leave()
            self._open_soon(is_moving=True)
        elif self.ring is not None and not self.ring.has_ended:  # its texts have not heard of it
            self.order.after(LOSS_MS, None, self._move)
        else:
            self._close_ring()

    def _report_boards(self) -> None:
        self._tell(rb.BoardsFound(self._usable))

    # --------------------------------------------------------------------------- the end

    def close(self) -> None:
        """Nobody asks any more: the ring is closed, and boards that stand still go on."""
        self._is_closed = True
        if self.ring is not None:
            self.ring.close()
        for board in self.boards.values():
            self.thaw(board)
