"""The bytes that each token stands for, and how a stream of tokens becomes text.

A token may hold a part of a character only. So tokens are turned into bytes one by one, and the bytes into characters:
a look-up for each token, whatever came before it.
"""

from __future__ import annotations

import codecs
import itertools
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flowspec_edge.manifest import MAX_SIZES

SPACE_MARK = "▁"
"""U+2581, which SentencePiece writes for a space."""
_MAX_TOKENS = MAX_SIZES["vocab_size"]
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MARKS_TO_SPACES = {"Replace", "Metaspace"}

Json = dict[str, Any]


def _byte_letters() -> dict[str, int]:
    """The letters in which GPT-2's vocabulary writes the 256 bytes: themselves where they can be seen in Latin-1."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted({*range(0x100)} - {*shown})
    return {chr(byte): byte for byte in shown} | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}


BYTE_LETTERS = _byte_letters()


class TokenTexts:
    """The bytes of every token of a tokenizer; those of special tokens and of unknown ids are empty.

    ``content`` is that of a ``tokenizer.json``. Its decoder must be a byte-level one, or SentencePiece's, with tokens
    for single bytes or without.

    Attributes:
        strips_space: whether a text's first space is left out, since one was put before the text when it was encoded.

    Raises:
        ValueError: the decoder is another one, or an id is too large.
    """

    def __init__(self, content: Json) -> None:
        self.is_byte_level, self.strips_space, has_byte_tokens = _read_decoder(content.get("decoder"))
        texts = {token: self._bytes_of(text, has_byte_tokens) for text, token in vocabulary(content["model"]).items()}
        for added in content.get("added_tokens") or []:
            texts[added["id"]] = b"" if added["special"] else self._bytes_of_added(added["content"])
        self.num_ids = max(texts, default=-1) + 1
        if self.num_ids > _MAX_TOKENS:
            raise ValueError(f"it has the token id {self.num_ids - 1}, at most {_MAX_TOKENS} ids are read")
        pieces = [texts.get(token, b"") for token in range(self.num_ids)]
        self._all = b"".join(pieces)
        self._ends = array("I", itertools.accumulate(map(len, pieces), initial=0))

    def __getitem__(self, token: int) -> bytes:
        return self._all[self._ends[token] : self._ends[token + 1]] if 0 <= token < self.num_ids else b""

    def _bytes_of(self, text: str, has_byte_tokens: bool) -> bytes:
        if not self.is_byte_level:
            byte = _BYTE_TOKEN.fullmatch(text) if has_byte_tokens else None
            return bytes.fromhex(byte[1]) if byte else self._bytes_of_added(text)
        try:
            return bytes(map(BYTE_LETTERS.__getitem__, text))
        except KeyError:  # no text of bytes: a token that was added
            return text.encode()

    def _bytes_of_added(self, text: str) -> bytes:
        return (text if self.is_byte_level else text.replace(SPACE_MARK, " ")).encode()


class Detokenizer:
    """Turns a stream of tokens into text as early as it is certain: an unfinished character waits for its last byte.

    The text goes on behind the tokens in ``before``, whose text is not repeated. What is no UTF-8 becomes U+FFFD.
    ``shown`` has the bytes of special tokens that are a part of the text.
    """

    def __init__(self, texts: TokenTexts, before: Sequence[int] = (), shown: Mapping[int, bytes] | None = None) -> None:
        self._texts = texts
        self._shown = shown or {}
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._strips_space = texts.strips_space and not any(texts[token] for token in before)
        self._characters.decode(_last_bytes(texts, before))

    def feed(self, tokens: Iterable[int]) -> str:
        """The text that has become certain with these tokens."""
        new = b"".join(self._shown.get(token) or self._texts[token] for token in tokens)
        if self._strips_space and new:
            self._strips_space = False
            new = new.removeprefix(b" ")
        return self._characters.decode(new)

    def finish(self) -> str:
        """U+FFFD where the stream ended in the middle of a character."""
        return self._characters.decode(b"", final=True)


def vocabulary(model: Json) -> dict[str, int]:
    """The ids of a model's own tokens, by their texts."""
    tokens = model.get("vocab", {})
    return tokens if isinstance(tokens, dict) else {text: token for token, (text, _) in enumerate(tokens)}


def steps_of(part: Json | None, inner: str) -> list[Json]:
    """The steps of a part that may be a sequence of steps, which it keeps under ``inner``."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for child in part[inner] for step in steps_of(child, inner)]
    return [part]


def _read_decoder(decoder: Json | None) -> tuple[bool, bool, bool]:
    """Whether a decoder is byte-level, whether it strips a text's first space, whether it knows tokens for bytes."""
    steps = steps_of(decoder, "decoders")
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return True, False, False
    strips = False
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}:
                pass
            case {"type": "Metaspace", "replacement": "▁"}:
                strips |= step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True)
            case {"type": "Strip", "content": " ", "start": 0 | 1, "stop": 0}:
                strips |= step["start"] == 1
            case {"type": "ByteFallback" | "Fuse"}:
                pass
            case _:
                raise ValueError(f"its decoder {'+'.join(kinds)} is not supported")
    if _MARKS_TO_SPACES.isdisjoint(kinds):
        raise ValueError(f"its decoder {'+'.join(kinds) or 'none'} is not supported")
    return False, strips, "ByteFallback" in kinds


def _last_bytes(texts: TokenTexts, tokens: Sequence[int]) -> bytes:
    """The end of the tokens' bytes, in which a character that they leave unfinished begins: three bytes or more."""
    last = b""
    for token in reversed(tokens):
        last = texts[token] + last
        if len(last) >= 3:
            break
    return last
