"""Text as it is written: given out as early as it is certain, and ended before a stop string."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flowspec_edge.engine.token_texts import Detokenizer
from flowspec_edge.engine.tokenizer import Tokenizer


class TextStream:
    """Takes tokens and returns their text as early as it is certain.

    A character or a stop string may end in a later token, so text that could still change is held back. A token takes
    no longer when the text has become long. The text goes on behind the tokens in ``before``, a prompt for example:
    prompt and text are what all these tokens are together. In the text of the first ``min_tokens`` tokens no stop
    string is looked for. Special tokens in ``shown`` are a part of the text.

    Attributes:
        stop: the stop string that ended the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...] = (),
        before: Sequence[int] = (),
        min_tokens: int = 0,
        shown: Sequence[int] = (),
    ) -> None:
        names = {token: tokenizer.bytes_of(token) for token in shown}
        self._detokenizer = Detokenizer(tokenizer.texts, before, names)
        self._num_unstopped = min_tokens
        self._stops = [_StopString(text) for text in stop]
        self._held = ""  # what is known and not given
        self._num_given = 0
        self.stop: str | None = None

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self.stop is not None

    def feed(self, tokens: tuple[int, ...]) -> str:
        """The text that has become certain with these tokens. It is empty after a stop string."""
        if self.is_stopped:
            return ""
        for token in tokens:
            self._read(self._detokenizer.feed((token,)))
            self._num_unstopped -= 1
        return self._give(max((stop.num_matched for stop in self._stops), default=0))

    def take(self, tokens: tuple[int, ...]) -> tuple[str, list[int]]:
        """Feed tokens one by one up to a stop string.

        Returns the certain text, and for each token that was taken how many characters were known before it.
        """
        text = ""
        offsets: list[int] = []
        for token in tokens:
            if self.is_stopped:
                break
            offsets.append(self.num_characters)
            text += self.feed((token,))
        return text, offsets

    @property
    def num_characters(self) -> int:
        """How many characters are known, those that are held back among them."""
        return self._num_given + len(self._held)

    def finish(self) -> str:
        """The text that was held back. An unfinished character becomes U+FFFD."""
        if self.is_stopped:
            return ""
        self._read(self._detokenizer.finish())
        return self._give(0)

    def _read(self, text: str) -> None:
        self._held += text
        for stop in self._stops:
            if self._num_unstopped > 0:
                stop.pass_over(text)
            else:
                stop.feed(text)

    def _give(self, num_uncertain: int) -> str:
        """All that is held but the last ``num_uncertain`` characters, which may become a stop string.

        Where a stop string begins before all of these, the text is cut there.
        """
        certain = self._num_given + len(self._held) - num_uncertain
        first = min(self._stops, key=lambda stop: stop.begins_at, default=None)
        if first is not None and first.begins_at <= certain:
            self.stop, certain = first.text, int(first.begins_at)
        num_given = max(certain - self._num_given, 0)
        given, self._held = self._held[:num_given], self._held[num_given:]
        self._num_given += num_given
        return given


class _StopString:
    """Looks for one string in a text that grows, each character of which is looked at once (Knuth, Morris and Pratt).

    The last ``num_matched`` characters of the text may become the string. It ``begins_at`` a place, which is infinite
    as long as it was not found.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._borders = [0, 0]  # per number of matched characters, how many of the last ones are the first ones as well
        for place in range(1, len(text)):
            self._borders.append(self._follow(self._borders[place], text[place]))
        self.num_matched = 0
        self.begins_at = math.inf
        self._num_read = 0

    def pass_over(self, text: str) -> None:
        """The text goes on, and the string is not looked for in it."""
        self._num_read += len(text)

    def feed(self, text: str) -> None:
        """The text goes on."""
        for letter in text:
            self.num_matched = self._follow(self.num_matched, letter)
            self._num_read += 1
            if self.num_matched == len(self.text):
                if self.begins_at == math.inf:
                    self.begins_at = self._num_read - len(self.text)
                self.num_matched = self._borders[-1]

    def _follow(self, num_matched: int, letter: str) -> int:
        """How many characters are matched with this one behind ``num_matched`` of them."""
        while num_matched and self.text[num_matched] != letter:
            num_matched = self._borders[num_matched]
        return num_matched + 1 if self.text[num_matched] == letter else 0
