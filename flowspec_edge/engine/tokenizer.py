"""Turns text into token ids, and token ids into text."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer as HuggingFaceTokenizer

from flowspec_edge.config import Text, TextPart
from flowspec_edge.engine.special_tokens import SpecialTokens
from flowspec_edge.engine.token_bytes import max_token_bytes
from flowspec_edge.engine.token_texts import SPACE_MARK, Detokenizer, Json, TokenTexts, steps_of
from flowspec_edge.errors import BundleError, RequestError

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or the library starts a thread per core for a single text


_WITHIN = "\x02"
"""Stands before a text that is tokenised as if it stood within another: a character that is in no token with others."""


class Tokenizer:
    """A bundle's ``tokenizer.json``. Texts that have more than ``max_tokens`` tokens for sure are refused unread.

    A text gets the tokens that it has and, in front of them, those that the file puts before every text, such as a BOS.

    Attributes:
        texts: the bytes that each token stands for.
        prefix: the tokens before every text.
        unused: what the file has kept from a training that is not for texts to be continued, as users read it.

    Raises:
        BundleError: the file is no tokenizer, or one of a kind that is not supported.
    """

    def __init__(self, path: Path, max_tokens: int | None = None) -> None:
        try:
            content = json.loads(path.read_bytes())
            self._unspaced = _take_first_space(content)
            self._tokenizer = (
                HuggingFaceTokenizer.from_file(str(path))
                if self._unspaced is None
                else HuggingFaceTokenizer.from_str(json.dumps(content))
            )
            self.texts = TokenTexts(content)
            self.unused = self._leave_training()
            self.prefix, suffix = self._read_frame()
        except Exception as cause:  # the library raises bare Exception
            raise BundleError(f"{path}: not a tokenizer ({cause}); export the bundle again") from cause
        if suffix:
            self.unused.append(f"the tokens {suffix} behind each text")
        self._special = SpecialTokens(content.get("added_tokens") or [])
        self._tokenizer.encode_special_tokens = True  # as plain text, for they are found here
        self._max_tokens = max_tokens
        self._max_token_bytes = None if max_tokens is None else max_token_bytes(content)

    def encode(self, text: Text, *, is_framed: bool = True) -> list[int]:
        """The text's tokens. Takes 0.3 ms per KB on a thread, in which other threads run.

        A text that itself begins with the tokens before every text does not get them twice, and one that is not to be
        framed gets none.

        Raises:
            RequestError: the text is too long to have ``max_tokens`` tokens, or has half of a character.
        """
        parts = [TextPart(text)] if isinstance(text, str) else text
        self._check_size("".join(part.text for part in parts))
        pieces = list(self._special.split(parts))
        if self._unspaced is not None and pieces and isinstance(first := pieces[0], str):
            pieces[0] = first if first.startswith(self._unspaced) else " " + first
        # A batch, even of one, is tokenised while other threads run; a single text is not.
        texts = [piece for piece in pieces if isinstance(piece, str)]
        encoded = iter(self._tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        ids = [token for piece in pieces for token in (next(encoded).ids if isinstance(piece, str) else [piece])]
        return ids if not is_framed or ids[: len(self.prefix)] == self.prefix else self.prefix + ids

    def encode_within(self, text: str) -> list[int]:
        """The tokens of what stands within a text: none before it, no space put in front, no special ones."""
        ids: list[int] = self._tokenizer.encode(_WITHIN + text, add_special_tokens=False).ids
        begun = b""
        for num, token in enumerate(ids, 1):
            begun += self.texts[token]
            if begun.lstrip() == _WITHIN.encode():
                return ids[num:]
        return ids

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens, special ones left out. What is no UTF-8 becomes U+FFFD."""
        detokenizer = Detokenizer(self.texts)
        return detokenizer.feed(tokens) + detokenizer.finish()

    def bytes_of(self, token: int) -> bytes:
        """What a token is told as where it is named alone: its bytes, or the name of a special token."""
        return self.texts[token] or (self._tokenizer.id_to_token(token) or "").encode()

    def token_id(self, text: str) -> int | None:
        """The id of the token with just this text, as ``tokenizer.json`` writes it."""
        token: int | None = self._tokenizer.token_to_id(text)
        return token

    def _leave_training(self) -> list[str]:
        """Turn off what would cut, fill or vary prompts; returns what that was."""
        library, model = self._tokenizer, self._tokenizer.model
        found = {
            "a limit of length": library.truncation,
            "padding": library.padding,
            "dropout": getattr(model, "dropout", None),
        }
        library.no_truncation()
        library.no_padding()
        if found["dropout"] is not None:
            model.dropout = None
        return [name for name, setting in found.items() if setting is not None]

    def _read_frame(self) -> tuple[list[int], list[int]]:
        """The tokens that the library puts before and behind each text."""
        text = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a").ids
        at = next(at for at in range(len(whole) + 1) if whole[at : at + len(text)] == text)
        return whole[:at], whole[at + len(text) :]

    def _check_size(self, text: str) -> None:
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


def _take_first_space(content: Json) -> tuple[str, ...] | None:
    """How texts begin before which the pre-tokenizer puts no space; None where it puts one before none.

    From now on it puts none at all. It would put one before each run of text that it is given, and is given a prompt
    in several, between its special tokens.
    """
    steps = steps_of(content.get("pre_tokenizer"), "pretokenizers")
    spacing = [step for step in steps if step["type"] == "Metaspace" and step.get("prepend_scheme") == "first"]
    for step in spacing:
        step["prepend_scheme"] = "never"
    added = content.get("added_tokens") or []
    texts = (token["content"] for token in added if not token["special"] and not token["normalized"])
    return (" ", SPACE_MARK, *texts) if spacing else None
