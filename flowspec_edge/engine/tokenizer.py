"""Turns text into token ids, and token ids into text while it is being written."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tokenizers import Tokenizer as HuggingFaceTokenizer

from flowspec_edge.engine.token_bytes import max_token_bytes
from flowspec_edge.errors import BundleError, RequestError

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or the library starts a thread per core for a single text


class Tokenizer:
    """A bundle's ``tokenizer.json``. Texts that have more than ``max_tokens`` tokens for sure are refused unread.

    Raises:
        BundleError: the file is no tokenizer.
    """

    def __init__(self, path: Path, max_tokens: int | None = None) -> None:
        try:
            self._tokenizer = HuggingFaceTokenizer.from_file(str(path))
        except Exception as cause:  # the library raises bare Exception
            raise BundleError(f"{path}: not a tokenizer ({cause}); export the bundle again") from cause
        self._max_tokens = max_tokens
        self._max_token_bytes = None if max_tokens is None else max_token_bytes(json.loads(path.read_bytes()))

    def encode(self, text: str) -> list[int]:
        """The text's tokens. Takes 0.3 ms per KB on a thread, in which other threads run.

        Raises:
            RequestError: the text is too long to have ``max_tokens`` tokens, or has half of a character.
        """
        try:
            num_bytes = len(text.encode())
        except UnicodeEncodeError as cause:
            raise RequestError(f"the text cannot be encoded in UTF-8 ({cause.reason} at {cause.start})") from cause
        if self._max_tokens is not None and self._max_token_bytes is not None:
            most = self._max_tokens * self._max_token_bytes
            if num_bytes > most:
                raise RequestError(
                    f"the text has {num_bytes} bytes; at most {most} can be {self._max_tokens} tokens, which the "
                    "model's context holds; shorten it"
                )
        # A batch, even of one, is tokenised while other threads run; a single text is not.
        ids: list[int] = self._tokenizer.encode_batch_fast([text])[0].ids
        return ids

    def decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


class TextStream:
    """Takes tokens and returns their text as early as it is certain.

    A character or a stop string may end in a later token, so text that could still change is held back.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._tokens: list[int] = []
        self._num_read = 0  # tokens whose text is in _text
        self._text = ""  # certain text
        self._num_given = 0
        self.is_stopped = False

    def feed(self, tokens: tuple[int, ...]) -> str:
        """The text that has become certain with these tokens. It is empty after a stop string."""
        self._tokens += tokens
        if self.is_stopped:
            return ""
        # Decode with a few tokens of context: byte-level and sentencepiece tokens depend on their neighbours.
        context = max(self._num_read - 4, 0)
        before = self._tokenizer.decode(self._tokens[context : self._num_read])
        now = self._tokenizer.decode(self._tokens[context:])
        if not now.endswith("�"):  # an unfinished character
            self._text += now[len(before) :]
            self._num_read = len(self._tokens)
        return self._give(self._certain_length())

    def take(self, tokens: tuple[int, ...]) -> tuple[str, int]:
        """Feed tokens one by one up to a stop string.

        Returns the certain text, and how many of the tokens were taken.
        """
        text = ""
        for num_taken, token in enumerate(tokens):
            if self.is_stopped:
                return text, num_taken
            text += self.feed((token,))
        return text, len(tokens)

    def finish(self) -> str:
        """The text that was held back. An unfinished character becomes U+FFFD."""
        if self.is_stopped:
            return ""
        before = self._tokenizer.decode(self._tokens[max(self._num_read - 4, 0) : self._num_read])
        self._text += self._tokenizer.decode(self._tokens[max(self._num_read - 4, 0) :])[len(before) :]
        self._num_read = len(self._tokens)
        return self._give(self._certain_length(is_end=True))

    def _certain_length(self, *, is_end: bool = False) -> int:
        """How many characters of the text cannot change any more.

        Where a stop string begins before all characters that could still become one, the text is cut there.
        """
        text = self._text
        held = 0
        for stop in () if is_end else self._stop:
            for length in range(min(len(stop) - 1, len(text)), held, -1):
                if text.endswith(stop[:length]):
                    held = length
                    break
        certain = len(text) - held
        first = min((at for stop in self._stop if (at := text.find(stop, self._num_given)) >= 0), default=len(text) + 1)
        if first > certain:
            return certain
        self.is_stopped = True
        self._text = text[:first]
        return first

    def _give(self, stop: int) -> str:
        start, self._num_given = self._num_given, max(stop, self._num_given)
        return self._text[start : self._num_given]
