"""Ids of calls in a dialogue, which some clients leave out, and some templates want in a form of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from flowspec_edge.web.call_form import ID_LENGTH, CallForm

Json = dict[str, Any]


def with_ids(messages: Sequence[Json], form: CallForm) -> list[Json]:
    """The messages, with an id for each call that the template takes, and that of its call for each result.

    Calls without an id are numbered, and their results come in the calls' order. An id always becomes the same one, so
    that a dialogue that goes on begins as before.
    """
    unanswered: list[str] = []
    num_calls, told = 0, []
    for message in messages:
        changed = dict(message)
        if calls := message.get("tool_calls"):
            ids = [_fitting(call["id"] or f"{num_calls + at:0{ID_LENGTH}d}", form) for at, call in enumerate(calls)]
            changed["tool_calls"] = [{**call, "id": id} for call, id in zip(calls, ids, strict=True)]
            num_calls += len(calls)
            unanswered += ids
        if message["role"] == "tool":
            given = message.get("tool_call_id")
            id = _fitting(given, form) if given else next(iter(unanswered), "")
            changed["tool_call_id"] = id
            unanswered = [other for other in unanswered if other != id]
        told.append(changed)
    return told


def _fitting(id: str, form: CallForm) -> str:
    """An id as the template takes it."""
    if not form.checks_ids or (len(id) == ID_LENGTH and id.isascii() and id.isalnum()):
        return id
    return hashlib.sha256(id.encode(errors="surrogatepass")).hexdigest()[:ID_LENGTH]
