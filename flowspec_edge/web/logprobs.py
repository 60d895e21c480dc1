"""Log-probabilities in the two forms that OpenAI's API knows, one of chats and one of completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowspec_edge.config import Logprob, Logprobs, TokenLogprobs

Json = dict[str, Any]

LEAST = -9999.0
"""What OpenAI tells of a token that cannot come. JSON has no minus infinity."""


def chat_logprobs(told: Logprobs | None) -> Json | None:
    """Of all tokens of a message, those of its reasoning included."""
    if told is None:
        return None

    def entry(one: Logprob) -> Json:
        text = told.texts[one.token]
        return {"token": _name(text), "logprob": _finite(one), "bytes": list(text)}

    content = [{**entry(one.drawn), "top_logprobs": [entry(likely) for likely in one.top]} for one in told.tokens]
    return {"content": content, "refusal": None}


def completion_logprobs(told: Logprobs | None) -> Json | None:
    """Of the tokens of a text.

    The token that was drawn is among ``top_logprobs`` even where it is none of the likeliest.
    """
    if told is None:
        return None
    return {
        "tokens": [_name_in_list(told.texts[one.drawn.token]) for one in told.tokens],
        "token_logprobs": [_finite(one.drawn) for one in told.tokens],
        "top_logprobs": [_by_name(one, told.texts) for one in told.tokens] if _has_top(told) else None,
        "text_offset": list(told.offsets),
    }


def mean_logprob(told: Logprobs | None) -> float:
    """Of the tokens of a whole text."""
    drawn = [] if told is None else [_finite(one.drawn) for one in told.tokens]
    return sum(drawn) / len(drawn) if drawn else LEAST


def _has_top(told: Logprobs) -> bool:
    return any(one.top for one in told.tokens)


def _by_name(one: TokenLogprobs, texts: Mapping[int, bytes]) -> Json:
    return {_name_in_list(texts[likely.token]): _finite(likely) for likely in (*one.top, one.drawn)}


def _finite(one: Logprob) -> float:
    return max(one.logprob, LEAST)


def _name(text: bytes) -> str:
    """A token's text, or its bytes in writing where they are a part of a character only: ``\\xe2\\x98``."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return _written(text)


def _name_in_list(text: bytes) -> str:
    """The same as completions have it, which tell no bytes beside it: ``bytes:\\xe2\\x98``."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return f"bytes:{_written(text)}"


def _written(text: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in text)
