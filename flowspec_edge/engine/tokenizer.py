"""Turns text into token ids, and token ids into text."""

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
