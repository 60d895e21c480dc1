"""OpenAI's completions: texts that go on with prompts.

Beyond OpenAI's fields a request may have ``top_k`` and ``schedule``, and ``parse_special``: where that is false,
special tokens in the prompt are plain text. An answer has ``token_ids`` beside each text, and the statistics of the
generation in ``flowspec``. Without a ``temperature`` the text is greedy; without ``max_tokens`` it has 128 tokens.

A text can go on at another server of the same bundle. A request with ``"flowspec": {"resumable": true}`` gets, in its
first event, ``"flowspec": {"bundle": ..., "prompt_token_ids": [...], "seed": ...}``. One that has ``bundle``,
``prompt_token_ids`` and the ``token_ids`` that have come in ``"flowspec": {"resume": {...}}``, and otherwise the first
request's options with that ``seed``, is answered with the rest; its ``prompt`` is not read. The statistics tell the
``resumed_tokens``.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import msgspec

from flowspec_edge.config import MAX_TOP_LOGPROBS, GenerateOptions, Piece, Prompt, Text, TextPart, UnfinishedText
from flowspec_edge.errors import FieldError, OtherBundleError, plain_text
from flowspec_edge.web.asked import Asked, AskedText, TextGenerator
from flowspec_edge.web.fields import UNSUPPORTED, Json, Whole, parse_field, parse_fields, shown, whole
from flowspec_edge.web.grammar_fields import grammar_of
from flowspec_edge.web.logprobs import completion_logprobs, mean_logprob
from flowspec_edge.web.text_fields import (
    MAX_CHOICES,
    TextFields,
    check_model,
    num_candidates,
    options_of,
    options_of_choice,
    usage_of,
)

DEFAULT = GenerateOptions()
TEXT, TEXTS, LISTS, TOKENS = rb'"', rb'\[\s*"', rb"\[\s*\[", rb"\["
PROMPTS: dict[bytes, Any] = {TEXT: str, TEXTS: list[str], LISTS: list[list[int]], TOKENS: list[int]}
"""The types of prompts, by how their JSON begins."""
PROMPT_RULE = "must be a text, its token ids, or a list of texts or of lists of token ids"


class Resume(msgspec.Struct, kw_only=True):
    """A text to go on with: what its first event told, and the tokens that have come."""

    bundle: str = ""
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class Extension(msgspec.Struct, kw_only=True):
    resumable: bool | None = None
    resume: Resume | None = None


class CompletionFields(TextFields, kw_only=True):
    """The body of ``POST /v1/completions``. A prompt is a text, its token ids, or a list of either: see ``PROMPTS``."""

    prompt: msgspec.Raw = msgspec.Raw()
    echo: bool | None = None
    logprobs: Whole | bool | None = None
    parse_special: bool | None = None
    flowspec: Extension | None = None


class Completions:
    """The dialect of ``POST /v1/completions``."""

    def __init__(self, generator: TextGenerator, *, is_strict: bool) -> None:
        self._generator = generator
        self._is_strict = is_strict

    async def read(self, body: bytes) -> Asked:
        """What a request asks for.

        Raises:
            RequestError: it asks for what is not there.
            OtherBundleError: the text to go on with was begun with another bundle.
        """
        fields, warnings = parse_fields(body, CompletionFields, is_strict=self._is_strict)
        check_model(fields, self._generator.model)
        extension = fields.flowspec or Extension()
        prompts = prompts_of(fields) if extension.resume is None else [self._unfinished(fields, extension.resume)]
        num, num_written = num_candidates(fields, len(prompts))
        if len(prompts) * num_written > 1 and (extension.resumable or extension.resume):
            raise FieldError("flowspec.resumable", "needs a single prompt, and n of 1", UNSUPPORTED)
        num_logprobs = _num_logprobs(fields)
        if num_logprobs is None and num_written > num:
            num_logprobs = 0  # by which the likeliest are found
        options = replace(options_of(fields, DEFAULT), num_logprobs=num_logprobs)
        named, _ = grammar_of(fields)
        texts = [
            AskedText(prompt, options_of_choice(options, at), named) for prompt in prompts for at in range(num_written)
        ]
        is_resumable = bool(extension.resumable)
        form = CompletionForm(self._generator, texts, fields, num, num_written, is_resumable=is_resumable)
        return Asked(texts, form, bool(fields.stream), warnings)

    def _unfinished(self, fields: CompletionFields, resume: Resume) -> Prompt:
        if fields.seed is None:
            raise FieldError("seed", "is missing; give the one that the text was begun with")
        if fields.echo:
            raise FieldError("echo", "is set for a text to go on with, whose prompt is not read", UNSUPPORTED)
        here = self._generator.bundle
        if resume.bundle != here:
            raise OtherBundleError(
                f"the text was begun with bundle {plain_text(resume.bundle[:12])}, and here is bundle {here:.12}, "
                "which would go on otherwise"
            )
        return UnfinishedText(prompt=tuple(resume.prompt_token_ids or ()), tokens=tuple(resume.token_ids or ()))


def prompts_of(fields: CompletionFields) -> list[Prompt]:
    """The prompts of a request. Raises FieldError where there is none, or what is there is none."""
    sent = bytes(fields.prompt).lstrip()
    if sent in (b"", b"null"):
        raise FieldError("prompt", "is missing; give the text to continue", "missing_required_parameter")
    begins = next((begin for begin in PROMPTS if re.match(begin, sent)), None)
    if begins is None:
        raise FieldError("prompt", f"is {shown(sent)}; it {PROMPT_RULE}")
    if begins == LISTS and (num := sent.count(b"[") - 1) > MAX_CHOICES:
        raise FieldError("prompt", f"has {num} lists; texts for at most {MAX_CHOICES} prompts are written at once")
    given = parse_field("prompt", fields.prompt, PROMPTS[begins])
    if not given and begins != TEXT:
        raise FieldError("prompt", f"is empty; it {PROMPT_RULE}")
    if fields.echo and begins in (TOKENS, LISTS):
        raise FieldError("echo", "is set, and the prompt is no text but token ids", UNSUPPORTED)
    prompts: list[Prompt] = [given] if begins in (TEXT, TOKENS) else given
    return [_unparsed(one) if fields.parse_special is False and isinstance(one, str) else one for one in prompts]


def _unparsed(text: str) -> Text:
    return [TextPart(text, parses_special=False)]


def _num_logprobs(fields: CompletionFields) -> int | None:
    if fields.logprobs is None or fields.logprobs is False:
        return None
    if fields.logprobs is True:
        raise FieldError("logprobs", "is true; for completions it is a number of tokens")
    num = whole("logprobs", fields.logprobs, 0)
    if not 0 <= num <= MAX_TOP_LOGPROBS:
        raise FieldError("logprobs", f"is {num}; it must lie between 0 and {MAX_TOP_LOGPROBS}")
    if fields.echo:
        raise FieldError("logprobs", "are not told of the tokens of an echo; leave one of both out", UNSUPPORTED)
    return num


class CompletionForm:
    """OpenAI's ``text_completion`` objects of one answer."""

    def __init__(
        self,
        generator: TextGenerator,
        texts: Sequence[AskedText],
        fields: CompletionFields,
        num_choices: int,
        num_candidates: int,
        *,
        is_resumable: bool,
    ) -> None:
        self._bundle = generator.bundle
        self._texts = texts
        self._num_choices = num_choices
        self._num_candidates = num_candidates
        self._has_logprobs = _num_logprobs(fields) is not None
        self._includes_usage = fields.includes_usage
        self._is_resumable = is_resumable
        self._echo = {choice: _text_of(text.prompt) for choice, text in enumerate(texts)} if fields.echo else {}
        self._statistics: list[Json] = [{}] * len(texts)
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": generator.model,
        }

    def events(self, choice: int, piece: Piece) -> list[Json]:
        event = {**self._head, "choices": [self._choice(choice, choice, piece)]}
        if self._includes_usage:
            event["usage"] = None
        if self._is_resumable and piece.prompt_token_ids is not None:
            event["flowspec"] = {
                "bundle": self._bundle,
                "prompt_token_ids": piece.prompt_token_ids,
                **self._about(choice),
            }
        if piece.statistics is not None:
            self._statistics[choice] = piece.statistics
            event["flowspec"] = {**piece.statistics, **self._about(choice)}
            if not self._includes_usage:
                event["usage"] = usage_of([piece.statistics], 1)
        return [event]

    def last_events(self) -> list[Json]:
        if not self._includes_usage:
            return []
        return [{**self._head, "choices": [], "usage": usage_of(self._statistics, self._num_candidates)}]

    def whole(self, choices: Sequence[Piece]) -> Json:
        statistics = [choice.statistics or {} for choice in choices]
        given = self._likeliest(choices)
        figures = [{**statistics[written], **self._about(written)} for written in given]
        return {
            **self._head,
            "choices": [self._choice(choice, written, choices[written]) for choice, written in enumerate(given)],
            "usage": usage_of(statistics, self._num_candidates),
            "flowspec": figures[0] if len(figures) == 1 else {"choices": figures},
        }

    def _likeliest(self, written: Sequence[Piece]) -> list[int]:
        """The places of the texts that are given: for each prompt those whose tokens are likeliest on average."""
        if self._num_choices == self._num_candidates:
            return [*range(len(written))]
        given: list[int] = []
        for first in range(0, len(written), self._num_candidates):
            places = range(first, first + self._num_candidates)
            given += sorted(places, key=lambda place: -mean_logprob(written[place].logprobs))[: self._num_choices]
        return given

    def _choice(self, choice: int, written: int, piece: Piece) -> Json:
        return {
            "index": choice,
            "text": self._echo.pop(written, "") + piece.text,
            "token_ids": piece.token_ids,
            "logprobs": completion_logprobs(piece.logprobs) if self._has_logprobs else None,
            "finish_reason": piece.finish_reason,
        }

    def _about(self, choice: int) -> Json:
        text = self._texts[choice]
        about = {"seed": text.options.seed}
        if isinstance(text.prompt, UnfinishedText):
            about["resumed_tokens"] = len(text.prompt.tokens)
        return about


def _text_of(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return "".join(part.text for part in cast("Sequence[TextPart]", prompt))
