"""A text as the client of a server asks for it: the request for all of it or for the rest, and what has come of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from flowspec_edge.config import GenerateOptions, Grammar, Piece
from flowspec_edge.core.answer_parts import TextLogprob, ToolCall, completion_logprobs_in
from flowspec_edge.errors import (
    ApiKeyError,
    FlowspecError,
    OtherBundleError,
    RequestError,
    ServerBusyError,
    StageFailedError,
)

DEFAULT_RETRY_S = 1.0
"""When to ask a busy server again that does not say."""

Json = dict[str, Any]


@dataclass(slots=True)
class AskedText:
    """``options`` are those of the whole text; without a ``seed`` the server draws one.

    Of a text that ``is_resumable`` the first server tells what it takes to go on with it elsewhere.
    """

    path = "/v1/completions"

    prompt: str
    options: GenerateOptions
    seed: int | None
    is_resumable: bool
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    has_ended: bool = False
    logprobs: list[TextLogprob] = field(default_factory=list)
    tool_calls: list[ToolCall] = field(default_factory=list)  # there are none in a completion
    _beginning: Json | None = None

    @property
    def has_begun(self) -> bool:
        return bool(self.token_ids)

    @property
    def can_go_on(self) -> bool:
        """Whether a server can be asked, for all of it or for the rest."""
        return self._beginning is not None or not self.token_ids

    def request(self) -> Json:
        """The body of a request for what has not come yet."""
        options = self.options
        body: Json = {
            "prompt": self.prompt,
            "max_tokens": options.max_new_tokens,
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
            "min_p": options.min_p,
            "repetition_penalty": options.repetition_penalty,
            "presence_penalty": options.presence_penalty,
            "frequency_penalty": options.frequency_penalty,
            "logit_bias": dict(options.logit_bias),
            "seed": self.seed,
            "stop": list(options.stop),
            "stop_token_ids": list(options.stop_token_ids),
            "ignore_eos": options.ignore_eos,
            "min_tokens": options.min_tokens,
            "schedule": options.schedule,
            "stream": True,
        }
        if options.num_logprobs is not None:
            body["logprobs"] = options.num_logprobs
        if options.grammar is not None:
            body["structured_outputs"] = _structured_outputs(options.grammar)
        if self.is_resumable:
            body["flowspec"] = {"resumable": True}
        if self._beginning is not None:
            beginning = dict(self._beginning)
            del body["prompt"]
            body["seed"] = beginning.pop("seed")
            body["flowspec"]["resume"] = {**beginning, "token_ids": self.token_ids}
        return body

    def take(self, event: Json) -> Piece:
        """Add what an event of the answer brings.

        Raises:
            FlowspecError: it tells of an error; see :func:`error_of`.
        """
        if "error" in event:
            raise error_of(event, 503)
        choice, extension = event["choices"][0], event.get("flowspec")
        piece = Piece(
            text=choice["text"],
            token_ids=choice.get("token_ids", []),
            finish_reason=choice["finish_reason"],
            statistics=extension if choice["finish_reason"] is not None else None,
        )
        if self.is_resumable and self._beginning is None and extension is not None and piece.statistics is None:
            self._beginning = extension
        self.logprobs += completion_logprobs_in(choice)
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.has_ended = piece.finish_reason is not None
        return piece


def _structured_outputs(grammar: Grammar) -> Json:
    """A grammar as vLLM's field of that name has it."""
    match grammar.kind:
        case "choice":
            return {"choice": json.loads(grammar.text)}
        case "lark":
            return {"grammar": grammar.text}
        case kind:
            return {kind: grammar.text}


def error_of(body: Json, status: int, retry_after_s: float = DEFAULT_RETRY_S) -> FlowspecError:
    """The error that a response of this status, or an event of a stream that broke off, tells of.

    It is a RequestError where the request is at fault.
    """
    error = body["error"]
    message, kind, code = str(error["message"]), error.get("type"), error.get("code")
    if code == "other_bundle":
        return OtherBundleError(message)
    if code == "invalid_api_key":
        return ApiKeyError(message)
    if code == "server_busy" or status == 429:
        return ServerBusyError(message, retry_after_s=retry_after_s)
    return RequestError(message) if status < 500 or kind == "invalid_request_error" else StageFailedError(message)
