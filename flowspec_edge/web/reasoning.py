"""Splits what a model writes into its reasoning, between ``<think>`` and ``</think>``, and what it says."""

from __future__ import annotations

from typing import NamedTuple

BEGIN, END = "<think>", "</think>"


class Split(NamedTuple):
    reasoning: str
    content: str


class ReasoningSplit:
    """Takes a text as it is written. Reasoning stands at its beginning, or nowhere.

    Args:
        has_begun: the prompt has ``<think>`` at its end, as templates of some models write it.
    """

    def __init__(self, *, has_begun: bool = False) -> None:
        self._state = "reasoning" if has_begun else "before"
        self._is_at_start = has_begun  # of the reasoning or the content, where space is left out
        self._held = ""

    def feed(self, text: str, *, is_last: bool = False) -> Split:
        """What has become certain with this text: what may be a part of a mark, or space before one, is held back."""
        self._held += text
        if self._state == "before":
            begins = self._held.lstrip()
            if begins.startswith(BEGIN):
                self._state, self._is_at_start, self._held = "reasoning", True, begins.removeprefix(BEGIN)
            elif is_last or not BEGIN.startswith(begins):
                self._state = "content"
        reasoning = ""
        if self._state == "reasoning":
            reasoning, found, rest = self._held.partition(END)
            if found:
                self._held, reasoning = rest, self._stripped(reasoning).rstrip()
                self._state, self._is_at_start = "content", True
            else:
                certain = len(reasoning) if is_last else _certain(reasoning)
                self._held = reasoning[certain:]
                reasoning = self._stripped(reasoning[:certain])
        content = ""
        if self._state == "content":
            content, self._held = self._stripped(self._held), ""
        return Split(reasoning, content)

    def _stripped(self, text: str) -> str:
        """Without the space at the start of reasoning or of what follows it."""
        if self._is_at_start:
            text = text.lstrip()
            self._is_at_start = not text
        return text


def _certain(text: str) -> int:
    """How many characters of reasoning cannot be space before its end, or a part of that."""
    for length in range(min(len(text), len(END) - 1), 0, -1):
        if text.endswith(END[:length]):
            return len(text[:-length].rstrip())
    return len(text.rstrip())
