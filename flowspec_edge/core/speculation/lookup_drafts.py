"""Drafts from the text itself: what lookup proposes below drafted rows becomes rows of the tree and of the table."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

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

    def add(self, places: Ints, next_id: int) -> list[TreeRow]:
        """Add what lookup proposes below the rows at these places and below the added ones, the likeliest first."""
        table = self._table
        places = places[table.scores[places] >= LOOKUP_MIN_SCORE]
        places = places[self._may_match(places)]
        ready = list(zip((-table.scores[places]).tolist(), table.ids[places].tolist(), places.tolist(), strict=True))
        heapq.heapify(ready)
        added: list[TreeRow] = []
        drafts: list[tuple[float, ...]] = []
        while ready and len(added) < LOOKUP_ROWS:
            negative_score, id, place = heapq.heappop(ready)
            row = self._tree[id]
            token, match = next(iter(self._matches(row).items()), (0, 0))
            if not match or token in row.children:
                continue
            log_chance = self._acceptance.log_chance_of_match(match)
            score = log_chance - negative_score
            if score >= LOOKUP_MIN_SCORE:
                added += self._tree.grow([next_id + len(added)], [id], [token])
                heapq.heappush(ready, (-score, added[-1].id, len(table.ids) + len(drafts)))
                drafts.append((added[-1].id, place, token, row.depth + 1, match, log_chance, score))
        if added:
            ids, above, tokens, depths, matches, log_chances, scores = zip(*drafts, strict=True)
            table.append(
                ids=ids,
                parents=above,
                tokens=tokens,
                depths=depths,
                matches=matches,
                log_probs=math.nan,
                log_chances=log_chances,
                scores=scores,
            )
        return added

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
        if row.parent == NO_PARENT:
            return NO_MATCHES
        above = self._tree[row.parent]
        if not self._lookup.has(above.token, row.token):
            return NO_MATCHES
        path = [row.token, above.token]
        while len(path) < MAX_MATCH and above.parent != NO_PARENT:
            above = self._tree[above.parent]
            path.append(above.token)
        return self._lookup.proposals(path[::-1])
