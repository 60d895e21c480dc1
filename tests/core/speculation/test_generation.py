"""One generation, told what the ring brings and asked what to do: its schedule is a script."""

import contextlib
from typing import ClassVar

import numpy as np
import pytest

from flowspec_edge.config import GenerateOptions
from flowspec_edge.core import events as ev
from flowspec_edge.core.limits import PREFILL_ROWS, TREE_MARGIN
from flowspec_edge.core.rows import NO_PARENT, Chunk, Floats, Passage, Row
from flowspec_edge.core.speculation.acceptance import Acceptance
from flowspec_edge.core.speculation.drafting import DraftShape
from flowspec_edge.core.speculation.generation import PROMPT_PASSES, Generation, TargetLimits
from flowspec_edge.core.speculation.pipeline import Pipeline, RingCosts, Traffic
from flowspec_edge.core.speculation.schedules.base import GenerationView, Schedule
from flowspec_edge.core.speculation.statistics import GenerationStatistics
from flowspec_edge.errors import ProtocolError, RequestError
from tests.core.speculation.comparable import comparable

SESSION = 7
VOCAB = 20
EOS = 0
PROMPT = (11, 12, 13)
ROOT = 2
"""The last row of the prompt; the first token after it is row 3."""


class Script(Schedule):
    """A schedule whose answers the test sets."""

    cancels: ClassVar[bool] = True

    def __init__(self, num_stages: int = 2) -> None:
        super().__init__(num_stages)
        self.rows: list[int] = []
        self.drafted: list[int] | None = None
        self.is_verifying_allowed = True
        self.begins: int | None = None
        self.asks_at: float | None = None
        self.verified: list[tuple[int, float]] = []

    def choose_rows(self, view: GenerationView, now: float) -> list[int]:
        rows, self.rows = self.rows, []
        return rows

    def choose_pass(self, view: GenerationView, now: float) -> list[int] | None:
        return self.drafted

    def may_verify(self, view: GenerationView) -> bool:
        return self.is_verifying_allowed

    def next_turn(self, view: GenerationView, has_credit: bool) -> int | None:
        return self.begins

    def next_time(self) -> float | None:
        return self.asks_at

    def take_verified(self, view: GenerationView, num_tokens: int, now: float) -> None:
        self.verified.append((num_tokens, now))


class LookingScript(Script):
    """Such a schedule that also drafts from the text itself."""

    is_calibrated: ClassVar[bool] = True
    uses_lookup: ClassVar[bool] = True


class Told:
    """A generation and its script; what it is told is built here."""

    def __init__(
        self,
        prompt: tuple[int, ...] = PROMPT,
        *,
        max_new_tokens: int = 10,
        max_context: int = 500,
        has_drafter: bool = True,
        taps: tuple[int, ...] = (),
        hidden_size: int = 0,
        script: Script | None = None,
        costs: RingCosts | None = None,
    ) -> None:
        self.script = script or Script()
        self.traffic = Traffic(costs or RingCosts(2))
        self.generation = Generation(
            SESSION,
            prompt,
            GenerateOptions(max_new_tokens=max_new_tokens),
            schedule=self.script,
            limits=TargetLimits(max_context, VOCAB, frozenset({EOS}), hidden_size),
            traffic=self.traffic,
            acceptance=Acceptance(),
            has_drafter=has_drafter,
            shape=DraftShape(width=2, proposals=2, children=2, rows_per_pass=2),
            taps=taps,
        )

    def next_chunk(self, now: float) -> Chunk | None:
        """What the generation offers leaves."""
        offer = self.generation.offer(now)
        return None if offer is None else self.generation.send(offer, now)

    def prefill(self) -> list[Chunk]:
        chunks = []
        while (chunk := self.next_chunk(0.0)) is not None:
            chunks.append(chunk)
        return chunks

    def send(self, *ids: int, now: float = 0.0) -> Chunk:
        self.script.rows = list(ids)
        chunk = self.next_chunk(now)
        assert chunk is not None
        return chunk

    def bring_back(self, *ids: int) -> None:
        """These rows return from the last stage."""
        rows = tuple(Row(id, self.generation.tree[id].parent, self.generation.tree[id].token) for id in ids)
        self.generation.take_returned(returned(rows), 1.0)

    def verify(self, *tokens: int | None, now: float = 1.0) -> list[ev.OriginAction]:
        """The head runs over all that waits; after each of these rows that token is drawn."""
        assert self.generation.next_head(now) is not None
        return self.generation.take_drawn(ev.HeadFinished(tokens), now)

    def draft(self, parents: list[int], proposals: list[list[int]]) -> None:
        """A pass of the drafter over these rows, which proposes two tokens after each."""
        self.script.drafted = parents
        job = self.generation.next_draft(1.0)
        assert job is not None
        log_probs = np.log(np.array([[0.6, 0.3]] * len(proposals), np.float32))
        self.generation.take_draft(ev.DraftFinished(np.array(proposals), log_probs), 1.0)
        self.script.drafted = None


def hidden(*values: float) -> Floats:
    return np.array([[value] for value in values], np.float32)


def returned(rows: tuple[Row, ...]) -> Chunk:
    """These rows, each with a hidden row that is its draft id."""
    return Chunk(SESSION, rows, len(rows), hidden(*(row.id for row in rows)))


def begin() -> Told:
    """The prompt is verified; the first token is 5, row 3, and it is the root."""
    told = Told()
    told.prefill()
    told.bring_back(0, 1, 2)
    told.verify(5)
    return told


def begin_with_tree() -> Told:
    """Below the root 3, rows 4 (token 6) and 5 (token 7); below 4 rows 6 (token 8) and 7 (token 9)."""
    told = begin()
    told.draft([], [[6, 7]])
    told.draft([4], [[8, 9]])
    return told


def chunk(*rows: tuple[int, int, int], num_wanted: int, turn: int = 0) -> Chunk:
    return Chunk(SESSION, tuple(Row(*row) for row in rows), num_wanted, turn=turn)


# ---------------------------------------------------------------------- the prompt


def test_the_prompt_goes_first_and_all_of_it_comes_back_for_the_drafter() -> None:
    told = Told()
    told.script.rows = [99]
    first = told.next_chunk(0.0)
    expected = chunk((0, NO_PARENT, 11), (1, 0, 12), (2, 1, 13), num_wanted=3)
    assert comparable(first) == comparable(expected)
    assert told.generation.sent == {0, 1, 2}


def test_without_a_drafter_only_the_last_row_comes_back() -> None:
    for told in (
        Told((1,) * (2 * PREFILL_ROWS + 1), has_drafter=False),
        Told((1,) * (2 * PREFILL_ROWS + 1), taps=(2,)),
    ):
        chunks = told.prefill()
        assert [len(chunk.rows) for chunk in chunks] == [PREFILL_ROWS, PREFILL_ROWS, 1]
        assert [chunk.num_wanted for chunk in chunks] == [0, 0, 1]
        assert len(told.generation.pipeline.flights) == 1, "a chunk that does not come back is not under way"


def test_a_prompt_enters_the_tree_as_it_leaves() -> None:
    told = Told((1,) * (2 * PREFILL_ROWS + 1))
    num_rows = []
    while (left := told.next_chunk(0.0)) is not None:
        num_rows.append(len(told.generation.tree))
        assert [row.id for row in left.rows] == list(range(num_rows[-1] - len(left.rows), num_rows[-1]))
        assert told.generation.sent == set(range(num_rows[-1]))
        told.generation.take_returned(returned(left.rows), 1.0)
        told.generation.check()
    assert num_rows == [PREFILL_ROWS, 2 * PREFILL_ROWS, 2 * PREFILL_ROWS + 1]
    head = told.generation.next_head(1.0)
    assert head is not None and [row.id for row in head.rows] == [2 * PREFILL_ROWS], "only the last row needs a draw"


def test_rows_of_the_prompt_are_committed_from_the_start() -> None:
    """So the first token does not walk through all of a long prompt."""
    told = Told()
    told.prefill()
    assert [row.next_token for row in told.generation.tree] == [12, 13, None]


def row_by_row() -> RingCosts:
    """Each stage takes 0.1 s a row, so a prompt leaves row by row; the drafter takes 0.05 s a row."""
    costs = RingCosts(2)
    for num_rows in (1, 2):
        costs.add_trip(0.2 * num_rows, [Passage(num_rows, 0.0, 0.1 * num_rows)] * 2)
        costs.draft.add(num_rows, 0.05 * num_rows)
    return costs


def pairs_of(job: ev.RunDraft | None) -> list[int]:
    """The rows of the prompt that a pass takes; none where there is no pass."""
    return [] if job is None else [row.id for row in job.rows]


def test_the_drafter_takes_a_prompt_as_it_comes_back_and_drafts_nothing_from_it() -> None:
    told = Told()
    told.prefill()
    told.bring_back(0, 1)
    assert pairs_of(told.generation.next_draft(1.0)) == [1, 2]
    told.generation.take_draft(ev.DraftFinished(np.array([[6, 7]]), np.zeros((1, 2), np.float32)), 2.0)
    assert not told.generation.drafting.scores and told.generation.drafting.num_passes == 0
    told.bring_back(2)
    assert told.generation.next_draft(1.0) is None, "the next pair is that of the first token"
    told.verify(5)
    told.script.drafted = []
    assert pairs_of(told.generation.next_draft(1.0)) == [3]


def test_the_drafter_does_not_begin_what_would_keep_the_first_token_waiting() -> None:
    """The rows are back at 0.2, 0.3 and 0.4 s."""
    told = Told(costs=row_by_row())
    assert [len(chunk.rows) for chunk in told.prefill()] == [1, 1, 1]
    told.bring_back(0)
    assert pairs_of(told.generation.next_draft(0.2)) == [1]
    told.generation.take_draft(ev.DraftFinished(np.array([[6, 7]]), np.zeros((1, 2), np.float32)), 0.25)
    told.bring_back(1)
    assert told.generation.next_draft(0.36) is None
    assert pairs_of(told.generation.next_draft(0.42)) == [2], "the row is late, and nobody knows by how much"


def test_beside_others_the_drafter_takes_a_prompt_in_parts_that_they_can_wait_for() -> None:
    """Two passes over two rows take as long as one over four."""
    told = Told(tuple(range(1, 11)), costs=row_by_row())
    Pipeline(told.traffic)
    told.prefill()
    for id in range(4):
        assert told.generation.next_draft(1.0) is None
        told.bring_back(id)
    assert PROMPT_PASSES == 2 and pairs_of(told.generation.next_draft(1.0)) == [1, 2, 3, 4]


def test_what_the_text_proposes_behind_the_prompt_leaves_before_the_first_token_is_known() -> None:
    told = Told((11, 12, 13, 14, 11, 12), script=LookingScript())
    told.prefill()
    assert [told.generation.tree[id].token for id, _ in told.generation.unsent()][:2] == [13, 14]
    told.send(6, 7)
    told.bring_back(5)
    assert told.verify(13)[1] == ev.EmitTokens(SESSION, (13,))
    assert told.generation.root == 6 and told.generation.sent >= {6, 7}
    told.bring_back(6)
    assert told.verify(14)[1] == ev.EmitTokens(SESSION, (14,))


def test_while_the_prompt_has_not_left_the_schedule_is_not_asked() -> None:
    told = Told()
    told.script.begins, told.script.asks_at = 1, 5.0
    assert told.generation.next_turn(has_credit=True) is None
    assert told.generation.next_deadline() is None
    told.prefill()
    assert told.generation.next_turn(has_credit=True) == ev.BroadcastTurn(SESSION, 1)
    assert told.generation.next_deadline() == 5.0


def test_the_cache_has_room_for_the_text_and_a_tree() -> None:
    assert Told(max_new_tokens=10).generation.capacity == len(PROMPT) + 10 + TREE_MARGIN
    assert Told(max_new_tokens=10, max_context=8).generation.capacity == 8 + TREE_MARGIN


def test_prompts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RequestError, match="^the prompt is empty; give at least one token$"):
        Told(())
    message = "^the prompt has 3 tokens, the model's context holds 3; shorten it to at most 2$"
    with pytest.raises(RequestError, match=message):
        Told(max_context=3)


@pytest.mark.parametrize("token", [-1, VOCAB, 2**32, 10**30])
def test_token_ids_that_the_model_does_not_have_are_refused(token: int) -> None:
    with pytest.raises(RequestError, match=f"^the prompt has the token id {token}; the model's lie between 0 and "):
        Told((1, token, 2))


def test_nothing_is_drafted_before_the_first_token() -> None:
    told = Told()
    told.script.drafted = []
    told.prefill()
    assert told.generation.next_draft(0.0) is None
    told.bring_back(0, 1, 2)
    told.verify(5)
    assert told.generation.next_draft(0.0) is not None


# ---------------------------------------------------------------------- the walk


def test_the_first_token_is_emitted_and_becomes_the_root() -> None:
    told = Told()
    told.prefill()
    told.bring_back(0, 1, 2)
    head = told.generation.next_head(1.0)
    expected = ev.RunHead(SESSION, (Row(2, 1, 13),), (2,), hidden(2), GenerateOptions(max_new_tokens=10))
    assert comparable(head) == comparable(expected), "the walk begins at the last row"
    actions = told.generation.take_drawn(ev.HeadFinished((5,)), 1.0)
    assert actions == [
        ev.BroadcastAdvance(SESSION, ROOT, 5),
        ev.EmitTokens(SESSION, (5,)),
        ev.ReportTrip(SESSION, 1, 1, 0, 0, 0),
    ]
    assert told.generation.root == 3
    assert 3 not in told.generation.sent, "it leaves as the schedule says"
    assert told.script.verified == [(1, 1.0)]


def test_the_walk_goes_on_while_the_token_is_in_the_tree_and_its_logits_are_here() -> None:
    told = begin_with_tree()
    told.send(3, 4, 5)
    told.send(6)
    told.bring_back(3, 4, 5)
    actions = told.verify(6, 8, 1)
    assert actions == [
        ev.BroadcastAdvance(SESSION, 4, 8),  # one for both tokens: ancestors are committed with it
        ev.EmitTokens(SESSION, (6, 8)),
        ev.ReportTrip(SESSION, 3, 2, 1, 4, 1),
    ]
    assert told.generation.root == 6
    told.generation.check()


def test_a_token_that_is_not_in_the_tree_becomes_a_root_that_was_never_sent() -> None:
    told = begin_with_tree()
    told.send(3, 4)
    told.bring_back(3)
    actions = told.verify(15)
    assert actions[:2] == [ev.BroadcastAdvance(SESSION, 3, 15), ev.EmitTokens(SESSION, (15,))]
    assert told.generation.root == 8
    assert told.generation.tree[8].token == 15
    assert told.generation.sent == {0, 1, 2, 3}
    drafting = told.generation.drafting
    assert not drafting.scores
    drafting.check()


def test_pruning_drops_what_hangs_elsewhere() -> None:
    """The text goes on with row 5: rows 4, 6 and 7 die, sent or not, and the chunk of 6 will not come back."""
    told = begin_with_tree()
    told.send(3, 4, 5)
    told.send(6)
    assert [id for id, _ in told.generation.unsent()] == [7]
    told.bring_back(3, 4, 5)
    actions = told.verify(7, 1, 9)
    assert actions[-1] == ev.ReportTrip(SESSION, 3, 2, 2, 4, 0)
    assert [id for id, _ in told.generation.unsent()] == []
    assert told.generation.sent == {0, 1, 2, 3, 5}
    assert told.generation.pipeline.flights == []
    assert told.generation.num_living_sent == 0


def test_rows_that_come_back_dead_bring_no_head() -> None:
    told = begin_with_tree()
    told.send(3, 4)
    told.send(6)
    late = (Row(6, 4, 8),)
    told.bring_back(3)
    told.verify(15)
    told.generation.take_returned(returned(late), 2.0)
    assert told.generation.next_head(2.0) is None
    assert not told.generation.is_verifying


def test_rows_that_die_while_they_wait_for_the_head_bring_none() -> None:
    told = begin_with_tree()
    told.send(3)
    told.send(4)
    told.bring_back(3)
    told.generation.next_head(1.0)
    told.bring_back(4)
    assert told.generation.is_verifying
    told.generation.take_drawn(ev.HeadFinished((15,)), 1.0)
    assert not told.generation.is_verifying


def test_logits_wait_until_the_walk_reaches_them() -> None:
    """The chunk of row 4 comes back before that of its parent."""
    told = begin_with_tree()
    told.send(3)
    told.send(4)
    told.bring_back(4)
    assert told.verify(15) == [ev.ReportTrip(SESSION, 1, 0, 0, 4, 1)]
    told.bring_back(3)
    assert told.verify(6)[:2] == [ev.BroadcastAdvance(SESSION, 4, 15), ev.EmitTokens(SESSION, (6, 15))]


def test_verification_waits_for_the_schedule() -> None:
    told = begin_with_tree()
    told.send(3)
    told.bring_back(3)
    told.script.is_verifying_allowed = False
    assert told.generation.next_head(1.0) is None
    told.script.is_verifying_allowed = True
    assert told.generation.next_head(1.0) is not None


def test_the_text_ends_with_its_last_token_and_nothing_behind_it() -> None:
    told = begin_with_tree()
    told.send(3, 4, 6)
    told.bring_back(3, 4, 6)
    assert told.verify(6, EOS, 9) == [
        ev.EmitTokens(SESSION, (6, EOS)),
        ev.ReportTrip(SESSION, 3, 2, 1, 4, 0),
        ev.FinishGeneration(SESSION, "stop"),
    ]
    assert told.generation.is_finished


def test_the_text_ends_at_its_length() -> None:
    told = Told(max_new_tokens=2)
    told.prefill()
    told.bring_back(0, 1, 2)
    assert told.verify(5)[-1] != ev.FinishGeneration(SESSION, "length")
    told.send(3)
    told.bring_back(3)
    assert told.verify(6)[-1] == ev.FinishGeneration(SESSION, "length")


def test_rows_so_deep_that_their_logits_cannot_matter_are_not_sent() -> None:
    """Of four tokens, 5 at depth 3 is known; rows at depth 5 bring the last, so row 8 at depth 6 would bring none."""
    told = Told(max_new_tokens=4)
    told.prefill()
    told.bring_back(0, 1, 2)
    told.verify(5)
    for parent, token in ((3, 6), (4, 7), (6, 8)):
        told.draft([parent] if parent > 3 else [], [[token, token + 5]])
    assert told.generation.max_depth == 5
    assert [id for id, _ in told.generation.unsent()] == [4, 6, 5, 7]


# ---------------------------------------------------------------------- what the schedule answers is done


def test_the_rows_that_the_schedule_chooses_leave_in_its_order_and_turn() -> None:
    told = begin_with_tree()
    told.script.turn = 4
    expected = chunk((3, 2, 5), (5, 3, 7), num_wanted=2, turn=4)
    assert comparable(told.send(3, 5, now=2.0)) == comparable(expected)
    assert told.generation.sent == {0, 1, 2, 3, 5}
    (flight,) = told.generation.pipeline.flights
    assert (flight.living, flight.sent_at, flight.turn) == ({3, 5}, 2.0, 4)
    assert told.next_chunk(2.0) is None, "an empty answer is to wait"


def test_a_pass_takes_verified_pairs_and_the_rows_that_the_schedule_chooses() -> None:
    told = begin()
    told.script.drafted = None
    assert told.generation.next_draft(1.0) is None
    told.script.drafted = []
    job = told.generation.next_draft(1.0)
    rows = (Row(1, 0, 12), Row(2, 1, 13), Row(3, 2, 5))
    assert comparable(job) == comparable(ev.RunDraft(SESSION, rows, np.arange(3), hidden(0, 1, 2), ()))
    told.generation.take_draft(ev.DraftFinished(np.array([[6, 7]]), np.log(np.array([[0.6, 0.3]], np.float32))), 2.0)
    assert [told.generation.tree[id].token for id in (4, 5)] == [6, 7]
    told.script.drafted = [4]
    job = told.generation.next_draft(2.0)
    no_pairs = np.zeros((0, 0), np.float32)
    assert comparable(job) == comparable(ev.RunDraft(SESSION, (Row(4, 3, 6),), np.array([3]), no_pairs, ()))


def test_the_drafter_is_told_once_of_rows_that_died() -> None:
    told = begin_with_tree()
    told.send(3)
    told.bring_back(3)
    told.verify(15)
    told.script.drafted = []
    job = told.generation.next_draft(1.0)
    assert job is not None
    assert sorted(job.dropped) == [4, 5, 6, 7]
    told.generation.take_draft(ev.DraftFinished(np.array([[1, 2]]), np.zeros((1, 2), np.float32)), 1.0)
    told.script.drafted = [9]
    job = told.generation.next_draft(1.0)
    assert job is not None
    assert job.dropped == ()


def test_without_a_drafter_none_is_asked_for_and_no_pair_waits_for_it() -> None:
    told = Told(has_drafter=False)
    told.prefill()
    told.bring_back(2)
    told.verify(5)
    told.script.drafted = []
    assert told.generation.num_unextended == 0
    assert told.generation.next_draft(1.0) is None


def test_tapped_rows_are_awaited_by_the_drafter_and_seen_by_the_schedule() -> None:
    told = Told(taps=(2,))
    assert told.generation.is_tapped
    told.prefill()
    told.bring_back(2)
    told.verify(5)
    assert told.generation.is_computing
    assert told.generation.num_unextended == 0
    told.generation.take_tapped(2, (0, 1, 2), hidden(20, 21, 22))
    assert not told.generation.is_computing
    assert told.generation.num_unextended == 3
    told.script.drafted = []
    job = told.generation.next_draft(1.0)
    assert job is not None
    assert comparable(job.hidden) == [[20.0], [21.0], [22.0]]
    with pytest.raises(ProtocolError, match="row 2 of layer 3 came unasked"):
        told.generation.take_tapped(3, (2,), hidden(0))


def test_it_is_computing_while_head_or_drafter_have_or_await_work() -> None:
    told = begin_with_tree()
    seen = []

    def look() -> None:
        seen.append((told.generation.is_verifying, told.generation.is_computing))

    look()
    told.send(3)
    told.bring_back(3)
    look()
    told.generation.next_head(1.0)
    look()
    told.generation.take_drawn(ev.HeadFinished((6,)), 1.0)
    look()
    told.script.drafted = [6]
    told.generation.next_draft(1.0)
    look()
    assert seen == [(False, False), (True, True), (True, True), (False, False), (False, True)]


def test_costs_of_head_and_drafter_are_measured() -> None:
    told = begin()
    costs = told.generation.pipeline.costs
    told.script.drafted = []
    told.generation.next_draft(2.0)
    told.generation.take_draft(ev.DraftFinished(np.array([[6, 7]]), np.zeros((1, 2), np.float32)), 2.3)
    assert costs.draft.line.at(3) == pytest.approx(0.3)
    told.send(3)
    told.bring_back(3)
    told.generation.next_head(3.0)
    told.generation.take_drawn(ev.HeadFinished((6,)), 3.4)
    assert costs.head.line.at(1) == pytest.approx(0.2, abs=0.01), "the first head took no time in this test"


def test_what_happened_is_counted() -> None:
    told = begin_with_tree()
    told.send(3, 4, 5)
    told.bring_back(3, 4, 5)
    told.verify(6, 15, 1)
    assert told.generation.statistics == GenerationStatistics(
        num_tokens=3,
        num_trips=2,
        num_verifications=2,
        num_rows_sent=3,
        num_rows_useful=1,
        num_draft_passes=2,
    )
    assert told.generation.statistics.acceptance_length == 1.5


def test_a_row_that_became_text_before_it_left_was_of_no_use() -> None:
    told = begin_with_tree()
    told.send(3)
    told.bring_back(3)
    told.verify(6)
    assert told.generation.root == 4
    assert told.generation.statistics.num_rows_useful == 0


def test_hidden_rows_of_another_model_are_refused() -> None:
    told = Told(hidden_size=4)
    told.prefill()
    rows = (Row(2, 1, PROMPT[2]),)
    with pytest.raises(ProtocolError, match="^hidden rows of 5 values came where the model has 4$"):
        told.generation.take_returned(Chunk(SESSION, rows, 1, np.zeros((1, 5), np.float32)), 1.0)
    with pytest.raises(ProtocolError, match="hidden rows of 3 values"):
        told.generation.take_tapped(2, (2,), np.zeros((1, 3), np.float32))
    told.generation.take_returned(Chunk(SESSION, rows, 1, np.zeros((1, 4), np.float32)), 1.0)


@pytest.mark.parametrize("order", [(0, 1), (0, 0, 1), (0, 1, 1), (0, 1, 0), (1, 0), (1, 1), (1, 0, 0)])
def test_a_prompt_that_does_not_come_back_in_order_ends_in_a_named_error(order: tuple[int, ...]) -> None:
    """The chunks of a prompt come back in this order; only where the last one comes first is that an error."""
    told = Told(tuple(1 + id % 10 for id in range(PREFILL_ROWS + 3)), has_drafter=True)
    chunks = told.prefill()
    assert len(chunks) == 2
    drafts = []
    with pytest.raises(ProtocolError) if order[0] else contextlib.nullcontext() as raised:
        for number in order:
            told.generation.take_returned(returned(chunks[number].rows), 1.0)
            if (head := told.generation.next_head(1.0)) is not None:
                told.generation.take_drawn(ev.HeadFinished((5,) * len(head.rows)), 1.0)
                told.script.drafted = []
                if told.generation.num_unextended:
                    drafts.append(told.generation.next_draft(1.0))
    if raised is not None:
        assert str(raised.value) == "session 7: row 0 has not come back, though rows have that left after it"
        assert not drafts
    else:
        assert len(drafts) == 1
