"""From another dialect's fields to the core's, so that whatever the core comes to do is done in every dialect."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from flowspec_edge.errors import FieldError
from flowspec_edge.web.asked import AskedText
from flowspec_edge.web.chat import ChatFields, ChatMessage
from flowspec_edge.web.fields import NEUTRAL, OwnFields, asks_for_nothing, parse_field, unsupported

ASKS_NOTHING: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("n", "best_of", "repetition_penalty", "top_p"), (1,)),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "min_p", "min_tokens", "top_k", "top_logprobs"), (0,)),
    **dict.fromkeys(("ignore_eos", "logprobs", "stream"), (False,)),
    **dict.fromkeys(("stop_token_ids", "stop", "tools"), ([],)),
    **dict.fromkeys(("logit_bias", "chat_template_kwargs", "stream_options"), ({},)),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
}
"""Values of a chat's fields that ask for nothing, where a dialect does not have these fields."""


def own_fields(idle: frozenset[str], neutral: Mapping[str, tuple[Any, ...]]) -> OwnFields:
    """A dialect's own fields, and those of chats: what chats can ask for and a dialect cannot is refused in it."""
    chats = {name: ASKS_NOTHING.get(name, ()) for name in ChatFields.__struct_fields__}
    return OwnFields(idle, {**chats, **neutral})


def chat_fields(given: Mapping[str, Any], messages: list[ChatMessage], called: Mapping[str, str]) -> ChatFields:
    """A chat's fields from values by OpenAI's names. None is absent.

    ``called`` says how the caller calls a field, where that is not the core's name.

    Raises:
        FieldError: the core does not know a field yet that asks for something, or one has no value of its type.
    """
    taken: dict[str, Any] = {"messages": []}
    for name, value in given.items():
        sent = msgspec.Raw(msgspec.json.encode(value))
        if name in ChatFields.__struct_fields__:
            taken[name] = sent
        elif not asks_for_nothing(sent, NEUTRAL.get(name, ())):
            raise unsupported(called.get(name, name), bytes(sent))
    with in_words_of(called):
        fields = parse_field("", msgspec.Raw(msgspec.json.encode(taken)), ChatFields)
    fields.messages = messages
    return fields


@contextlib.contextmanager
def in_words_of(called: Mapping[str, str]) -> Iterator[None]:
    """Have faults of the core's fields named as the caller called these."""
    try:
        yield
    except FieldError as cause:
        raise cause.named(_called(cause.name, called)) from cause


def renamed(texts: Sequence[AskedText], called: Mapping[str, str]) -> list[AskedText]:
    """The texts, with what the caller calls the fields that have their grammar."""
    return [
        replace(
            text,
            grammar_field=_called(text.grammar_field, called),
            grammar_lines=[_called(line, called) for line in text.grammar_lines],
        )
        for text in texts
    ]


def _called(name: str, called: Mapping[str, str]) -> str:
    """Of a place in a field that the caller calls otherwise, only the field is named, or that part of the place that
    ``called`` has: those keys of it begin with a dot.
    """
    for part, theirs in called.items():
        if part.startswith("."):
            name = name.replace(part, theirs)
    return called.get(name) or called.get(name.partition(".")[0], name)
