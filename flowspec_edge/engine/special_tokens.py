"""Finds special tokens in prompts, in those parts of them where they may stand."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from flowspec_edge.config import TextPart

Json = dict[str, Any]

_OF_WORDS = {"Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "Pc"}
"""Categories of the characters in words, as the regular expressions of Rust have them."""


class SpecialTokens:
    """The special ones among a ``tokenizer.json``'s ``added_tokens``.

    Of two that begin at one place the longer one is found. ``lstrip`` and ``rstrip`` take the spaces before and behind
    with them, ``single_word`` wants no letter or digit there.
    """

    def __init__(self, added: Sequence[Json]) -> None:
        self._by_text = {token["content"]: token for token in added if token["special"] and token["content"]}
        self._lengths = sorted({len(text) for text in self._by_text}, reverse=True)
        beginnings = sorted({re.escape(text[:2]) for text in self._by_text}, reverse=True)
        self._beginning = re.compile("|".join(beginnings) or "(?!)")

    def split(self, parts: Sequence[TextPart]) -> Iterator[str | int]:
        """The parts as the ids of special tokens and the texts between them, none of which is empty.

        Texts that stand side by side are one, whichever parts they come from.
        """
        text = ""
        for part in parts:
            at = 0
            for start, end, token in self._find_all(part.text) if part.parses_special else ():
                if text := text + part.text[at:start]:
                    yield text
                yield token
                text, at = "", end
            text += part.text[at:]
        if text:
            yield text

    def _find_all(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Where special tokens begin and end, and their ids."""
        end = at = 0
        while found := self._beginning.search(text, at):
            start = found.start()
            token = self._longest_at(text, start)
            if token is None:
                at = start + 1
                continue
            if token["lstrip"]:
                start = end + len(text[end:start].rstrip())
            end = found.start() + len(token["content"])
            while token["rstrip"] and text[end : end + 1].isspace():
                end += 1
            yield start, end, token["id"]
            at = end

    def _longest_at(self, text: str, start: int) -> Json | None:
        for length in self._lengths:
            token = self._by_text.get(text[start : start + length])
            if token is not None and not (token["single_word"] and _has_word_beside(text, start, start + length)):
                return token
        return None


def _has_word_beside(text: str, start: int, end: int) -> bool:
    beside = text[max(start - 1, 0) : start] + text[end : end + 1]
    return any(unicodedata.category(letter) in _OF_WORDS for letter in beside)
