"""Drafts from the text itself: what lookup proposes below drafted rows becomes rows of the tree and of the table."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from flowspec_edge.core.speculation.acceptance import Acceptance, Ints
from flowspec_edge.core.speculation.draft_table import DraftTable
from flowspec_edge.core.speculation.lookup import MAX_MATCH, Lookup, pair_of
from flowspec_edge.core.speculation.tree import Tree, TreeRow

LOOKUP_ROWS = 24
"""The most rows that one lookup adds."""
LOOKUP_MIN_SCORE = math.log(0.01)
"""Lookup adds no row that scores less."""
NO_PAIR = -1
"""Of a root that is the first token of its text."""


class LookupRow(NamedTuple):
    """A row that is proposed: the next one of the chain below the row ``seed`` of the tree, each of which has one."""

    seed: int
    token: int
    match: int
    log_chance: float


class LookupDrafts:
    """What the text of one session proposes after the rows of its ``table``, which are those of its ``tree``."""

    def __init__(self, tree: Tree, table: DraftTable, lookup: Lookup, acceptance: Acceptance) -> None:
        self._tree = tree
        self._table = table
        self._lookup = lookup
        self._acceptance = acceptance
        self._matched: dict[int, Mapping[int, int]] = {}  # per row, what was looked up since the text has grown
        self._paths: dict[int, tuple[int, ...]] = {}  # the last MAX_MATCH tokens up to a row, its own first

    def extend(self, text: Sequence[int]) -> None:
        """The text goes on, up to the table's root."""
        self._lookup.extend(text)
        self._matched.clear()
        table, end = self._table, self._lookup.end
        self._paths = {int(table.ids[0]): end}
        table.pairs[0] = pair_of(end[1], end[0]) if len(end) > 1 else NO_PAIR

    def propose(self, places: Ints) -> list[LookupRow]:
        """What lookup proposes below the rows at these places and below what it proposes, the likeliest first."""
        table = self._table
        places = places[table.scores[places] >= LOOKUP_MIN_SCORE]
        ready = [
            (-float(table.scores[place]), int(table.ids[place]), int(table.ids[place]), matches)
            for place, matches in ((places[number], matches) for number, matches in self.after(places).items())
        ]
        heapq.heapify(ready)
        tips: dict[int, tuple[int, ...]] = {}  # the path to the last row of each seed's chain
        proposed: list[LookupRow] = []
        while ready and len(proposed) < LOOKUP_ROWS:
            negative_score, _, seed, matches = heapq.heappop(ready)
            token, match = next(iter(matches.items()))
            if seed not in tips and token in self._tree[seed].children:
                continue
            log_chance = self._acceptance.log_chance_of_match(match)
            score = log_chance - negative_score
            if score >= LOOKUP_MIN_SCORE:
                proposed.append(LookupRow(seed, token, match, log_chance))
                path = tips[seed] = (token, *(tips.get(seed) or self._path_to(seed)))[:MAX_MATCH]
                if following := self._lookup.proposals(path):
                    heapq.heappush(ready, (-score, int(table.ids[-1]) + len(proposed), seed, following))
        return proposed

    def add(self, proposed: Sequence[LookupRow], next_id: int) -> list[TreeRow]:
        """Take in what was proposed, with draft ids from ``next_id`` on. Rows that have come since then stay as they
        are, and nothing is added below those that have gone.
        """
        table, tips = self._table, dict[int, int]()  # the last row of each seed's chain
        added: dict[int, tuple[float, ...]] = {}
        for seed, token, match, log_chance in proposed:
            above = tips.get(seed, seed)
            if above in added:
                place, (*_, score) = len(table.ids) + above - next_id, added[above]
            elif (place := int(table.places([above])[0])) >= 0:
                score = float(table.scores[place])
            else:
                continue
            row = self._tree[above]
            if (known := row.children.get(token)) is not None:
                tips[seed] = known
                continue
            tips[seed] = id = next_id + len(added)
            self._tree.grow([id], [above], [token], [row.depth + 1])
            added[id] = (place, token, row.depth + 1, match, log_chance, score + log_chance)
        if added:
            above_each, tokens, depths, matches, log_chances, scores = zip(*added.values(), strict=True)
            table.append(
                next_id,
                parents=above_each,
                tokens=tokens,
                depths=depths,
                matches=matches,
                log_probs=math.nan,
                log_chances=log_chances,
                scores=scores,
            )
        return [self._tree[id] for id in added]

    def after(self, places: Ints) -> dict[int, Mapping[int, int]]:
        """What the text proposes after these places: token -> length of the match, the longest first.

        It is told by the number of each place among them, of those after which anything is proposed.
        """
        table, known = self._table, self._lookup.pairs
        numbers = [number for number, pair in enumerate(table.pairs[places].tolist()) if pair in known]
        found = ((number, self._matches(int(table.ids[places[number]]))) for number in numbers)
        return {number: matches for number, matches in found if matches}

    def check(self) -> None:
        """Assert the invariants: paths are those of the tree."""
        for id, path in self._paths.items():
            rows = self._tree.path(id)[-MAX_MATCH:]
            assert path == tuple(row.token for row in reversed(rows))

    def _matches(self, id: int) -> Mapping[int, int]:
        """What the text proposes after a row, the last two tokens of which it has."""
        found = self._matched.get(id)
        if found is None:
            found = self._matched[id] = self._lookup.proposals(self._path_to(id))
        return found

    def _path_to(self, id: int) -> tuple[int, ...]:
        """The last MAX_MATCH tokens up to the root or a row below it, its own first."""
        tree, paths = self._tree, self._paths
        above: list[TreeRow] = []
        while (path := paths.get(id)) is None:
            above.append(row := tree[id])
            id = row.parent
        for row in reversed(above):
            path = paths[row.id] = (row.token, *path[: MAX_MATCH - 1])
        return path


def match_lengths(matched: Mapping[int, Mapping[int, int]], tokens: Ints) -> Ints:
    """The length of the match of each of ``tokens`` [rows, children], one after the other; 0 where there is none.

    ``matched`` has what lookup proposes, by the number of the row.
    """
    lengths = np.zeros(tokens.shape, np.int64)
    for number, found in matched.items():
        row = tokens[number].tolist()
        for token, length in found.items():
            if token in row:
                lengths[number, row.index(token)] = length
    return lengths.ravel()
