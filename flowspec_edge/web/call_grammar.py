"""The grammar of a message that may call tools: from the moment a call begins it is one of a tool that is there, and
its arguments are what the tool's schema asks for.

It is a Lark grammar as llguidance reads it. The rule of each tool's arguments stands in a line of its own, in their
order, and behind them that of the content, where a request says what that may be. So a fault of a line is one of a
tool, or of the content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flowspec_edge.config import Grammar
from flowspec_edge.web.call_form import ID_LENGTH, PYTHON_TAG, CallForm
from flowspec_edge.web.content_rule import content_rules, json_rule
from flowspec_edge.web.reasoning import BEGIN, END

Json = dict[str, Any]

ANY = r"(.|\n)*"


class CallableTool(NamedTuple):
    """A tool that may be called, and the JSON schema of its arguments."""

    name: str
    parameters: Json


def write_call_grammar(
    form: CallForm,
    tools: Sequence[CallableTool],
    special: Mapping[str, int],
    *,
    is_forced: bool,
    is_parallel: bool,
    is_reasoning: bool,
    content: Grammar | None = None,
) -> Grammar:
    """What a message may be.

    Args:
        special: the ids of special tokens, by their texts.
        is_forced: it is a call, or several. Otherwise it may be any text, and a call may come behind it.
        is_parallel: it may have several calls.
        is_reasoning: it begins within reasoning, in which nothing is a call.
        content: what it is instead where it has no call; any text where that is None.

    Raises:
        FieldError: the content is no schema, or cannot be told from calls.
    """
    literal = _Literals(special)
    numbers = range(len(tools))
    lines = [json_rule(f"arguments_{at}", tools[at].parameters) for at in numbers]
    if content is not None:
        lines += content_rules(form, content)
    lines += [f"call_{at}: {literal(tools[at].name + form.middle)} arguments_{at}" for at in numbers]
    id = rf'(", \"id\": \"" /[a-zA-Z0-9]{{{ID_LENGTH}}}/ "\"")?' if form.tells_ids else ""
    further = f"({literal(form.between)} call)*" if is_parallel and form.between is not None else ""
    lines += [
        f"call: ({' | '.join(f'call_{at}' for at in numbers)}) {id}",
        f"calls: call {further} {literal(form.end)}",
        f"ANY: /{ANY}/",
    ]
    if is_forced:
        lines += [f"start: {_begun(form, literal)} calls"]
    else:
        lines += (_or_text if content is None else _or_content)(form, literal, is_reasoning=is_reasoning)
    return Grammar("lark", "\n".join(lines))


def special_tokens_of(form: CallForm, special: Mapping[str, int]) -> tuple[int, ...]:
    """The special tokens that calls have, which must be told for a call to be read."""
    literal = _Literals(special)
    parts = (PYTHON_TAG if not form.mark else "", form.begin, form.middle, form.between or "", form.end)
    return tuple(sorted({token for part in parts for token in literal.tokens_in(part)}))


class _Literals:
    """Writes texts for a grammar, in which special tokens stand by their ids."""

    def __init__(self, special: Mapping[str, int]) -> None:
        self.special = special
        texts = sorted(filter(None, special), key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, texts)) or '(?!)'})")

    def __call__(self, text: str) -> str:
        parts = filter(None, self._pattern.split(text))
        return " ".join(f"<[{self.special[part]}]>" if part in self.special else json.dumps(part) for part in parts)

    def tokens_in(self, text: str) -> list[int]:
        return [self.special[part] for part in self._pattern.split(text) if part in self.special]


def _begun(form: CallForm, literal: _Literals) -> str:
    """What stands before the first call's name."""
    begun = literal(form.begin)
    return f"({literal(PYTHON_TAG)}? {begun})" if not form.mark and PYTHON_TAG in literal.special else begun


def _or_content(form: CallForm, literal: _Literals, *, is_reasoning: bool) -> list[str]:
    """Rules of calls or the content, of which one comes at once, or behind reasoning and the space after it.

    A terminal takes all that it can. So the space is a part of the reasoning, or a content that may begin with space
    would take it before a call. Nothing has space at its beginning, which a small model would write for ever.
    """
    begin = "" if is_reasoning else json.dumps(BEGIN)
    return [
        rf"THOUGHT: {begin} (ANY & ~(ANY {json.dumps(END)} ANY)) {json.dumps(END)} /\s{{0,4}}/",
        f"answer: {_begun(form, literal)} calls | content",
        f"start: THOUGHT answer{'' if is_reasoning else ' | answer'}",
    ]


def _or_text(form: CallForm, literal: _Literals, *, is_reasoning: bool) -> list[str]:
    """Rules of any text, in which calls may begin.

    A lazy rule takes the text as soon as it can, and nothing else can take it then. So what is within reasoning is none
    of the rules' that look for a call, and where one of these has found its mark only a call can follow.
    """
    thought = ("" if is_reasoning else rf"\s*{re.escape(BEGIN)}") + ANY
    end = END.replace("/", r"\/")
    lines = [f"thinking[lazy]: /{thought}{end}/", "rest: ANY"]
    if not form.mark:
        begin = literal(form.begin)
        tagged = f"| {literal(PYTHON_TAG)} {begin} calls" if PYTHON_TAG in literal.special else ""
        lines += [
            f"answer: BEGUN calls {tagged} | OTHER",
            rf"BEGUN: /\s*/ {begin}",
            "OTHER: ANY & ~(BEGUN ANY)",
        ]
        return [*lines, f"start: thinking answer | {'rest' if is_reasoning else 'answer'}"]
    mark, behind = literal(form.mark), literal(form.begin.removeprefix(form.mark))
    lazy = "" if form.mark in literal.special else "[lazy]"  # no text has a special token
    lines += [f"said{lazy}: ANY {mark}", f"answer: said {behind} calls | rest"]
    if is_reasoning:
        return [*lines, "start: thinking answer | rest"]
    return [
        *lines,
        f"said_at_once{lazy}: THOUGHTLESS {mark}",
        f"THOUGHTLESS: ANY & ~/{thought}/",
        f"start: thinking answer | said_at_once {behind} calls | rest",
    ]
