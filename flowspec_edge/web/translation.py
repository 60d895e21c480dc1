"""From another dialect's fields to the core's, so that whatever the core comes to do is done in every dialect."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from flowspec_edge.errors import FieldError
from flowspec_edge.web.chat import ChatFields, ChatMessage
from flowspec_edge.web.fields import NEUTRAL, asks_for_nothing, unsupported


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
    fields = msgspec.json.decode(msgspec.json.encode(taken), type=ChatFields)
    fields.messages = messages
    return fields


@contextlib.contextmanager
def in_words_of(called: Mapping[str, str]) -> Iterator[None]:
    """Have faults of the core's fields named as the caller called these."""
    try:
        yield
    except FieldError as cause:
        raise cause.named(called.get(cause.name, cause.name)) from cause
