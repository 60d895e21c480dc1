"""Drafts from the text itself: the tokens that followed earlier places with the same last few tokens.

Prompt and output of one session are indexed by pairs of tokens. Code, tables and edits repeat themselves; where they
do, a continuation costs no pass of a drafter and may leave with its root. (Saxena, Prompt Lookup Decoding, 2023.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

MIN_MATCH = 2
"""One matching token alone says little, and nearly every token has one."""
MAX_MATCH = 8
"""Longer matches are not told apart."""
MAX_PROPOSALS = 3
"""Tokens proposed after one row."""
MAX_PLACES = 24
"""How many earlier places of a pair are compared, the latest first."""


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
                pair, place = _pair(self._text[-1], token), len(self._text) + 1
                self._earlier.append(self._latest.get(pair, 0))
                self._latest[pair] = place
            self._text.append(token)

    def has(self, before: int, token: int) -> bool:
        """Whether the text holds this pair: only then is there anything to propose after it."""
        return _pair(before, token) in self._latest

    def proposals(self, path: Sequence[int]) -> dict[int, int]:
        """The proposed next tokens after ``path``, each with the length of its match.

        The longest match comes first, of equally long ones the latest. The tokens of ``path`` need not be in the index,
        and its last ``MAX_MATCH`` tokens count.
        """
        text, found = self._text, dict[int, int]()
        if len(path) < MIN_MATCH:
            return found
        for place in self._places(path[-2], path[-1]):
            if place == len(text):
                continue
            longest = min(MAX_MATCH, place, len(path))
            length = MIN_MATCH
            while length < longest and text[place - 1 - length] == path[-1 - length]:
                length += 1
            if length > found.get(text[place], 0):
                found[text[place]] = length
        return dict(sorted(found.items(), key=lambda item: -item[1])[:MAX_PROPOSALS])

    def _places(self, before: int, token: int) -> Iterator[int]:
        """The places right behind a pair, the latest first, at most MAX_PLACES."""
        place = self._latest.get(_pair(before, token), 0)
        for _ in range(MAX_PLACES):
            if not place:
                return
            yield place
            place = self._earlier[place]


def _pair(before: int, token: int) -> int:
    """Two tokens as one number: a text of 200,000 pairs has no object for each that the garbage collector looks at."""
    return before << 32 | token
