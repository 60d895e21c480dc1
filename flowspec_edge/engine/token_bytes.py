"""How much text one token can stand for, from what ``tokenizer.json`` says of itself.

A text that is longer than the context times that cannot fit, which is known without tokenising it.
"""

from __future__ import annotations

from typing import Any

from flowspec_edge.engine.token_texts import steps_of

NFC_BYTES = 8
"""Bytes of a text for one byte of its composed form, at most: a character of several canonical parts takes two bytes or
more, and has at most four parts of at most four bytes."""
CHARACTER_BYTES = 4
"""Of UTF-8, at most."""
_KEEPING = {"ByteLevel", "Metaspace", "Digits", "Split"}
"""Ways to cut a text before it is tokenised that keep all of it, unless they say ``Removed``."""

Json = dict[str, Any]


def max_token_bytes(tokenizer: Json) -> int | None:
    """The most bytes of UTF-8 for which the tokenizer can give a single token; None where that has no known bound.

    ``tokenizer`` is the content of a ``tokenizer.json``.
    """
    model, added = tokenizer["model"], tokenizer.get("added_tokens") or []
    cuts = steps_of(tokenizer.get("pre_tokenizer"), "pretokenizers")
    growth = _normalised_bytes(steps_of(tokenizer.get("normalizer"), "normalizers"))
    if (
        growth is None
        or model.get("type") != "BPE"
        or any(cut["type"] not in _KEEPING or cut.get("behavior") == "Removed" for cut in cuts)
        or any(
            token.get("lstrip") or token.get("rstrip") for token in added
        )  # these take any number of spaces with them
    ):
        return None
    vocabulary = model["vocab"]
    if any(cut["type"] == "ByteLevel" for cut in cuts):  # each of the 256 bytes is written as one character
        if sum(len(token) == 1 for token in vocabulary) < 256:
            return None  # bytes without a token would be left out
        longest = max(map(len, vocabulary))
    elif model.get("byte_fallback") and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        longest = max(len(token.encode()) for token in vocabulary)
    else:
        return None  # any number of unknown characters may become one token, or none
    special = max((len(token["content"].encode()) for token in added), default=0)
    return growth * max(longest, special, CHARACTER_BYTES)


def _normalised_bytes(steps: list[Json]) -> int | None:
    """How many bytes may become one in these steps; None where that is not known."""
    growth = 1
    for step in steps:
        match step:
            case {"type": "NFC"}:
                growth *= NFC_BYTES
            case {"type": "Prepend"}:
                pass
            case {"type": "Replace", "pattern": {"String": before}, "content": after} if len(before.encode()) <= len(
                after.encode()
            ):
                pass
            case _:
                return None
    return growth
