"""Drafts from the text itself: what lookup proposes below drafted rows becomes rows of the tree and of the table."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flowspec_edge.core.rows import NO_PARENT
from flowspec_edge.core.speculation.acceptance import Acceptance, Ints
from flowspec_edge.core.speculation.draft_table import DraftTable
from flowspec_edge.core.speculation.lookup import MAX_MATCH, Lookup
from flowspec_edge.core.speculation.tree import Tree, TreeRow

LOOKUP_ROWS = 24
"""The most rows that one lookup adds."""
LOOKUP_MIN_SCORE = math.log(0.01)
"""Lookup adds no row that scores less."""
NO_MATCHES: Mapping[int, int] = MappingProxyType({})


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

    def extend(self, text: Sequence[int]) -> None:
        """The text goes on."""
        self._lookup.extend(text)
        self._matched.clear()

    def propose(self, places: Ints) -> list[LookupRow]:
        """What lookup proposes below the rows at these places and below what it proposes, the likeliest first."""
        table = self._table
        places = places[table.scores[places] >= LOOKUP_MIN_SCORE]
        places = places[self._may_match(places)]
        ids = table.ids[places].tolist()
        ready = list(zip((-table.scores[places]).tolist(), ids, ids, strict=True))
        heapq.heapify(ready)
        paths: dict[int, list[int]] = {}  # to the last row of each seed's chain
        proposed: list[LookupRow] = []
        while ready and len(proposed) < LOOKUP_ROWS:
            negative_score, _, seed = heapq.heappop(ready)
            row, path = self._tree[seed], paths.get(seed)
            matches = self._matches(row) if path is None else self._lookup.proposals(path)
            token, match = next(iter(matches.items()), (0, 0))
            if not match or (path is None and token in row.children):
                continue
            log_chance = self._acceptance.log_chance_of_match(match)
            score = log_chance - negative_score
            if score >= LOOKUP_MIN_SCORE:
                paths.setdefault(seed, self._path_to(row)).append(token)
                proposed.append(LookupRow(seed, token, match, log_chance))
                heapq.heappush(ready, (-score, int(table.ids[-1]) + len(proposed), seed))
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
            self._tree.grow([id], [above], [token])
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

    def after(self, places: Ints) -> list[Mapping[int, int]]:
        """What the text proposes after each of these places: token -> length of the match, the longest first."""
        found = zip(self._table.ids[places].tolist(), self._may_match(places).tolist(), strict=True)
        return [self._matches(self._tree[id]) if may_match else NO_MATCHES for id, may_match in found]

    def _may_match(self, places: Ints) -> NDArray[np.bool_]:
        """Whether the text may propose anything after each of these places: not where it lacks the last two tokens."""
        tokens, parents = self._table.tokens, self._table.parents[places]
        has: NDArray[np.bool_] = np.array(self._lookup.has_each(tokens[parents], tokens[places]), np.bool_)
        has[places == 0] = True  # the root's parent is not in the table
        return has

    def _matches(self, row: TreeRow) -> Mapping[int, int]:
        """What the text proposes after a row: token -> length of the match, the longest first."""
        found = self._matched.get(row.id)
        if found is None:
            found = self._matched[row.id] = self._find_matches(row)
        return found

    def _find_matches(self, row: TreeRow) -> Mapping[int, int]:
        if row.parent == NO_PARENT or not self._lookup.has(self._tree[row.parent].token, row.token):
            return NO_MATCHES
        return self._lookup.proposals(self._path_to(row))

    def _path_to(self, row: TreeRow) -> list[int]:
        """The last MAX_MATCH tokens up to a row."""
        path = [row.token]
        while len(path) < MAX_MATCH and row.parent != NO_PARENT:
            row = self._tree[row.parent]
            path.append(row.token)
        return path[::-1]
