"""The drafted part of a session's tree: its scores, what the drafter has run, and what it should run next.

A row's score is the log of the chance that the target takes the whole path from the root to it. So a parent never
scores below its child, and in the order of scores it comes first. When the root moves, surviving rows keep their place
and what was drafted below them: scores count from the new root, and the frontier goes on growing where it is.
(FlowSpec, section 3: dynamic draft expansion.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flowspec_edge.core.speculation.acceptance import Acceptance, Ints, Reals
from flowspec_edge.core.speculation.draft_table import DraftTable, LikelyDrafts
from flowspec_edge.core.speculation.lookup import Lookup
from flowspec_edge.core.speculation.lookup_drafts import LookupDrafts, match_lengths
from flowspec_edge.core.speculation.tree import Tree, TreeRow
from flowspec_edge.core.speculation.unchecked import Unchecked

LOOKUP_SEEDS = 8
"""How many of the likeliest rows are looked up anew when the root moves."""
REFRESH_SCORE = math.log(0.3)
"""Running a row again counts like running one for the first time that is 0.3 times as likely."""


@dataclass(frozen=True, slots=True)
class DraftShape:
    """How a draft tree grows.

    A pass of the drafter runs ``width`` rows, and proposes the likeliest ``proposals`` tokens after each. Of these up
    to ``children`` may become rows, and of those the likeliest ``rows_per_pass`` of the pass do.
    """

    width: int = 10
    proposals: int = 64
    children: int = 10
    rows_per_pass: int = 40


class Drafting:
    """Scores of one session's drafted rows, and which of them the drafter has run.

    Without ``acceptance`` the draft's own probabilities are taken for the chances of acceptance. Without ``lookup``
    nothing is drafted from the text itself. Where it ``is_checked``, what it proposes becomes ``unchecked``, and rows
    once it has been. Nothing may be drafted before ``move_root`` has said below which row.
    """

    def __init__(
        self,
        tree: Tree,
        shape: DraftShape,
        *,
        acceptance: Acceptance | None = None,
        lookup: Lookup | None = None,
        is_checked: bool = False,
    ) -> None:
        self._tree = tree
        self._acceptance = acceptance
        self.shape = shape
        self.num_passes = 0
        self.num_sent = 0  # of the drafted rows
        self._table = DraftTable()
        self._from_text: LookupDrafts | None = None
        if lookup is not None:
            assert acceptance is not None, "only calibrated drafts are looked up"
            self._from_text = LookupDrafts(tree, self._table, lookup, acceptance)
        self.unchecked = Unchecked() if is_checked and lookup is not None else None
        self._unsent: tuple[int, float, list[int], list[float]] | None = None  # what was asked for, and the answer

    def __len__(self) -> int:
        """The number of drafted rows."""
        return len(self._table)

    @property
    def scores(self) -> dict[int, float]:
        """The log-chance of each drafted row, counted from the root; made anew each time."""
        return dict(zip(self._table.ids[1:].tolist(), self._table.scores[1:].tolist(), strict=True))

    def scores_of(self, ids: Sequence[int]) -> list[float]:
        """The scores of the root, which is 0, and of drafted rows."""
        return self._table.scores[self._table.places(ids)].tolist()  # type: ignore[no-any-return]

    def observe(self, parent: int, token: int) -> None:
        """The target chose ``token`` after ``parent``: learn from the children that were drafted for it."""
        table = self._table
        children = table.places(list(self._tree[parent].children.values()))
        if self._acceptance is not None and len(children):
            self._acceptance.observe(
                table.log_probs[children], table.matches[children], table.tokens[children] == token
            )

    def mark_sent(self, ids: Sequence[int]) -> None:
        """These rows have left the origin; the root may be one of them."""
        self._unsent = None
        self._table.sent[self._table.places(ids)] = 1
        self.num_sent = int(self._table.sent[1:].sum())

    def move_root(self, root: int, text: Sequence[int], next_id: int) -> list[TreeRow]:
        """The text has grown by the tokens ``text``: forget what is not below ``root``, and score the rest from there.

        Returns the rows that lookup has added, with draft ids from ``next_id`` on.
        """
        self._unsent = None
        row = self._tree[root]
        self._table.move_root(root, row.token, row.depth)
        self.num_sent = int(self._table.sent[1:].sum())
        self._table.log_chances[:] = self._log_chances(self._table.log_probs, self._table.matches)
        self._table.score()
        if self._from_text is None:
            return []
        self._from_text.extend(text)
        seeds = np.argsort(-self._table.scores, kind="stable")  # the root comes first
        proposed = self._from_text.propose(seeds[: LOOKUP_SEEDS + 1])
        if self.unchecked is not None:
            self.unchecked.begin(proposed)
            return []
        return self._from_text.add(proposed, next_id)

    def add_checked(self, num_allowed: Sequence[int], next_id: int) -> list[TreeRow]:
        """So many rows of each chain that was asked about may come. Returns the new rows, numbered from ``next_id``."""
        assert self._from_text is not None and self.unchecked is not None, "nothing was to be checked"
        self._unsent = None
        return self._from_text.add(self.unchecked.take_checked(num_allowed), next_id)

    def add_forced(self, tokens: Sequence[int], next_id: int) -> list[TreeRow]:
        """Only these tokens can come behind the root. They cost no pass, may leave with it, and count as if the draft
        were sure of them. Returns the new rows, with draft ids from ``next_id`` on.
        """
        self._unsent = None
        row, num_known = self._tree[int(self._table.ids[0])], 0
        while num_known < len(tokens) and (child := row.children.get(tokens[num_known])) is not None:
            row, num_known = self._tree[child], num_known + 1
        if not (new := tokens[num_known:]):
            return []
        table, (place,) = self._table, self._table.places([row.id])
        first, ids, steps = len(table.ids), range(next_id, next_id + len(new)), np.arange(1, len(new) + 1)
        log_chance = self._log_chances(np.zeros(1), np.zeros(1, np.int64))
        table.append(
            next_id,
            parents=[int(place), *range(first, first + len(new) - 1)],
            tokens=new,
            depths=row.depth + steps,
            matches=0,
            log_probs=0.0,
            log_chances=float(log_chance[0]),
            scores=table.scores[place] + log_chance * steps,
        )
        return self._tree.grow(ids, [row.id, *ids[:-1]], new, range(row.depth + 1, row.depth + 1 + len(new)))

    def frontier(self, width: int, max_depth: int, since: int = 0) -> list[int]:
        """The likeliest rows whose children are not drafted yet, though their parent's are; at most ``width``.

        Rows at position ``max_depth`` and deeper are left out, since their children could not become text. Only passes
        after number ``since`` count: rows that earlier ones ran are to be run again.
        """
        places = self._runnable(max_depth, -math.inf, since)
        return self._ids(places[self._table.ran[places] <= since][:width])

    def stale(self, width: int, max_depth: int, since: int = 0) -> list[int]:
        """The likeliest rows that ran before their parent ran again: another pass would see its newer features."""
        places = self._runnable(max_depth, -math.inf, since)
        return self._ids(places[self._table.ran[places] > since][:width])

    def next_pass(self, width: int, max_depth: int, min_score: float) -> list[int]:
        """The rows that are most worth a pass, frontier and stale ones together."""
        return self._ids(self._runnable(max_depth, min_score)[:width])

    def best_rows(self, most: int, since: int = 0) -> list[int]:
        """The likeliest rows, sent or not, whose parents ran after pass number ``since``; at most ``most``."""
        return self._ids(self._table.best(self._table.ran[self._table.parents] > since)[:most])

    def unsent(self, max_depth: int, min_score: float) -> Iterator[tuple[int, float]]:
        """Drafted rows that may be sent and their scores, best first, parents before children; none below
        ``min_score``.

        The same is asked for after most events, and few of them change it. So it is kept.
        """
        if self._unsent is None or self._unsent[:2] != (max_depth, min_score):
            self._unsent = (max_depth, min_score, *self._find_unsent(max_depth, min_score))
        return zip(*self._unsent[2:], strict=True)

    def likeliest(self, num_rows: int) -> LikelyDrafts:
        """Of the drafted rows those that have left and then the likeliest, at most ``num_rows``."""
        return self._table.likeliest(num_rows)

    def merge(
        self, parents: Sequence[int], tokens: Ints, log_probs: NDArray[np.float32], next_id: int
    ) -> list[TreeRow]:
        """Take in one pass: children of ``parents``, [rows, k] tokens and log-probabilities, the likeliest first.
        Those with minus infinity become no rows.

        Returns the new rows.

        Children that exist get the new score, and what is below them with it. Of the others the likeliest become rows,
        with draft ids from ``next_id`` on: ``rows_per_pass``, or 2.5 per parent if that is more. Parents that died
        meanwhile get no children.
        """
        self.num_passes += 1
        self._unsent = None
        places = self._table.places(parents)
        is_living = places >= 0
        if np.count_nonzero(is_living) < len(places):
            places, tokens, log_probs = places[is_living], tokens[is_living], log_probs[is_living]
        if not len(places):
            return []
        self._table.ran[places] = self.num_passes
        matched = self._from_text.after(places) if self._from_text else {}
        num_added = max(self.shape.rows_per_pass, 5 * len(parents) // 2)
        added = self._add_likeliest(places, tokens, log_probs, matched, num_added, next_id)
        if self._from_text is not None:
            last = len(self._table.ids)
            proposed = self._from_text.propose(np.arange(last - len(added), last))
            if self.unchecked is not None:
                self.unchecked.add(proposed)
            else:
                added += self._from_text.add(proposed, next_id + len(added))
        return added

    def check(self) -> None:
        """Assert the invariants: the table has what lives below the root, and scores add up along each path."""
        self._table.check(self._tree)
        if self._from_text is not None:
            self._from_text.check()
        if self._unsent is not None:
            assert self._unsent[2:] == self._find_unsent(*self._unsent[:2])

    # ------------------------------------------------------------------ inside

    def _add_likeliest(
        self,
        places: Ints,
        tokens: Ints,
        log_probs: NDArray[np.float32],
        matched: Mapping[int, Mapping[int, int]],
        num_added: int,
        next_id: int,
    ) -> list[TreeRow]:
        """Of what a pass proposes below these places, add the ``num_added`` likeliest rows.

        ``matched`` has what lookup proposes after some of the places, by their number.
        """
        table = self._table
        children, numbers, columns = self._tell_children(places, tokens, log_probs, matched)
        num_children = min(self.shape.children, tokens.shape[1])
        tokens, new_log_probs = tokens[:, :num_children], log_probs[:, :num_children].astype(np.float64).ravel()
        matches = match_lengths(matched, tokens)
        log_chances = self._score_children(children, new_log_probs, matches)
        log_chances[new_log_probs == -np.inf] = -np.inf
        is_there = columns < num_children
        log_chances[numbers[is_there] * num_children + columns[is_there]] = -np.inf
        scores = table.scores[places].repeat(num_children) + log_chances
        best = (-scores).argsort(kind="stable")[:num_added]
        if scores[best[-1]] == -np.inf:
            best = best[scores[best] > -np.inf]
        above, new_tokens = places[best // num_children], tokens.ravel()[best]
        depths = table.depths[above] + 1
        table.append(
            next_id,
            parents=above,
            tokens=new_tokens,
            depths=depths,
            matches=matches[best],
            log_probs=new_log_probs[best],
            log_chances=log_chances[best],
            scores=scores[best],
        )
        ids = range(next_id, next_id + len(best))
        return self._tree.grow(ids, self._ids(above), new_tokens.tolist(), depths.tolist())

    def _score_children(self, children: Ints, log_probs: Reals, matches: Ints) -> Reals:
        """Score these children of rows that have run, and all that is below them, by what the table has of them now.

        Returns the log-chances of what may become children as well, of which ``log_probs`` and ``matches`` are given:
        to weigh both at once takes as long as one of them.
        """
        table = self._table
        if not len(children):
            return self._log_chances(log_probs, matches)
        log_chances = self._log_chances(
            np.concatenate([table.log_probs[children], log_probs]), np.concatenate([table.matches[children], matches])
        )
        table.log_chances[children] = log_chances[: len(children)]
        table.score()
        return log_chances[len(children) :]

    def _tell_children(
        self,
        places: Ints,
        tokens: Ints,
        log_probs: NDArray[np.float32],
        matched: Mapping[int, Mapping[int, int]],
    ) -> tuple[Ints, Ints, Ints]:
        """Set what a pass and the text say of the children that are below these places already.

        Returns the places of these children, and where in ``tokens`` [rows, k] each stands: its row and its column,
        which is k where the draft does not propose it. It is less likely then than all that the draft proposes.
        """
        table = self._table
        children, numbers = table.children_of(places)
        known = table.tokens[children]
        is_it = tokens.take(numbers, axis=0) == known[:, None]  # [existing children, k]
        is_it[:, -1] = True
        columns = is_it.argmax(axis=1)
        is_missing = tokens[numbers, columns] != known
        table.log_probs[children] = log_probs[numbers, columns] - is_missing
        table.matches[children] = 0
        if matched:
            for child, number, token in zip(children.tolist(), numbers.tolist(), known.tolist(), strict=True):
                if found := matched.get(number):
                    table.matches[child] = found.get(token, 0)
        return children, numbers, columns + is_missing

    def _runnable(self, max_depth: int, min_score: float, since: int = 0) -> Ints:
        """The places of the rows that the drafter can run, the most worthwhile first."""
        table = self._table
        ran, parent_ran = table.ran, table.ran[table.parents]
        may_run = (ran < parent_ran) & (parent_ran > since) & (table.scores >= min_score) & (table.depths < max_depth)
        may_run[:1] = False  # the root
        places = may_run.nonzero()[0]
        worth = table.scores[places] + REFRESH_SCORE * (ran[places] > since)
        places = places[(-worth).argsort(kind="stable")]
        return places[: len((worth >= min_score).nonzero()[0])]

    def _find_unsent(self, max_depth: int, min_score: float) -> tuple[list[int], list[float]]:
        """The draft ids of drafted rows that may be sent, and their scores, as ``unsent`` has them."""
        table = self._table
        places = table.best((table.scores >= min_score) & (table.sent == 0) & (table.depths <= max_depth))
        return self._ids(places), table.scores[places].tolist()

    def _ids(self, places: Ints) -> list[int]:
        return self._table.ids[places].tolist()  # type: ignore[no-any-return]

    def _log_chances(self, log_probs: Reals, matches: Ints) -> Reals:
        if self._acceptance is not None:
            return self._acceptance.log_chances(log_probs, matches)
        return np.minimum(log_probs, 0.0)  # rounding may leave a certain token a little more than certain
