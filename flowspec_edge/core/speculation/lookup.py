"""Drafts from the text itself: the tokens that followed earlier places with the same last few tokens.

Prompt and output of one session are indexed by pairs of tokens. Code, tables and edits repeat themselves; where they
do, a continuation costs no pass of a drafter and may leave with its root. (Saxena, Prompt Lookup Decoding, 2023.)
"""

from __future__ import annotations

from collections.abc import KeysView, Sequence
from operator import itemgetter
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

MIN_MATCH = 2
"""One matching token alone says little, and nearly every token has one."""
MAX_MATCH = 8
"""Longer matches are not told apart."""
MAX_PROPOSALS = 3
"""Tokens proposed after one row."""
MAX_PLACES = 24
"""How many earlier places of a pair are compared, the latest first."""

Tokens = TypeVar("Tokens", int, NDArray[np.int64])


class Lookup:
    """The text of one session so far."""

    def __init__(self, text: Sequence[int] = ()) -> None:
        self._text: list[int] = []
        self._latest: dict[int, int] = {}  # per pair, the last place right behind it
        self._earlier: list[int] = [0, 0]  # per place, the one before it behind the same pair; 0 for none
        self.extend(text)

    def extend(self, tokens: Sequence[int]) -> None:
        """The text goes on."""
        for token in tokens:
            if self._text:
                pair, place = pair_of(self._text[-1], token), len(self._text) + 1
                self._earlier.append(self._latest.get(pair, 0))
                self._latest[pair] = place
            self._text.append(token)

    @property
    def end(self) -> tuple[int, ...]:
        """The last ``MAX_MATCH`` tokens of the text, the last one first."""
        return tuple(self._text[: -MAX_MATCH - 1 : -1])

    @property
    def pairs(self) -> KeysView[int]:
        """All pairs of tokens that the text holds: only after one of them is there anything to propose."""
        return self._latest.keys()

    def proposals(self, path: Sequence[int]) -> dict[int, int]:
        """The proposed next tokens after ``path``, whose last token comes first, each with the length of its match.

        The longest match comes first, of equally long ones the latest. The tokens of ``path`` need not be in the index,
        and its last ``MAX_MATCH`` tokens count.
        """
        found: dict[int, int] = {}
        if len(path) < MIN_MATCH:
            return found
        text, earlier, longest_path = self._text, self._earlier, min(MAX_MATCH, len(path))
        place = self._latest.get(pair_of(path[1], path[0]), 0)  # right behind the pair, the latest first
        if place == len(text):
            place = earlier[place]
        num_left = MAX_PLACES
        while place and num_left:
            token, length, longest = text[place], MIN_MATCH, place if place < longest_path else longest_path
            while length < longest and text[place - 1 - length] == path[length]:
                length += 1
            if length > found.get(token, 0):
                found[token] = length
            place, num_left = earlier[place], num_left - 1
        if len(found) < 2:
            return found
        return dict(sorted(found.items(), key=itemgetter(1), reverse=True)[:MAX_PROPOSALS])


def pair_of(before: Tokens, token: Tokens) -> Tokens:
    """Two tokens as one number, or each two of two arrays.

    So a text of 200,000 pairs has no object for each that the garbage collector looks at.
    """
    return before << 32 | token
