"""Ollama's objects: one for each piece of an answer, and the last one with durations in nanoseconds and counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from flowspec_edge.config import Piece
from flowspec_edge.web.asked import TextGenerator
from flowspec_edge.web.chat import ChatTexts
from flowspec_edge.web.framing import Json
from flowspec_edge.web.message_split import CallPart, Said, arguments_of

NS_PER_S = 1_000_000_000


def chat_part(said: Said) -> Json:
    """How ``/api/chat`` tells what is said, and the calls that are whole."""
    message: Json = {"role": "assistant", "content": said.content}
    if said.reasoning:
        message["thinking"] = said.reasoning
    if said.calls:
        message["tool_calls"] = [
            {"id": call.id, "function": {"index": call.number, "name": call.name, "arguments": arguments_of(call)}}
            for call in said.calls
        ]
    return {"message": message}


def generate_part(said: Said) -> Json:
    """How ``/api/generate`` tells what is said."""
    return {"response": said.content} | ({"thinking": said.reasoning} if said.reasoning else {})


class OllamaForm:
    """The form of one answer, or of none, for a request that has a model loaded. ``model`` is what the caller calls it.

    ``part`` makes what is said a part of an object.
    """

    def __init__(
        self, generator: TextGenerator, model: str | None, asked: ChatTexts, part: Callable[[Said], Json]
    ) -> None:
        self._model = generator.model if model is None else model
        self._seeds = [text.options.seed for text in asked.texts]
        self._split = asked.split()
        self._call: CallPart | None = None  # what has come of one that is not whole
        self._part = part
        self._last: Piece | None = None

    def events(self, choice: int, piece: Piece) -> list[Json]:
        if piece.finish_reason is not None:
            self._last = piece
        said = self._said(piece.text, is_last=piece.finish_reason is not None)
        return [self._object(said, is_done=False)] if any(said) else []

    def last_events(self) -> list[Json]:
        return [self._object(Said("", ""), is_done=True) | self._ending()]

    def whole(self, choices: Sequence[Piece]) -> Json:
        text = "".join(piece.text for piece in choices)
        self._last = choices[-1] if choices else None
        return self._object(self._said(text, is_last=True), is_done=True) | self._ending()

    def sign_of_life(self, notice: str) -> Json:
        """An object that says nothing yet, as Ollama itself sends some: clients add up what objects say."""
        return self._object(Said("", ""), is_done=False) | {"flowspec": {"notice": notice}}

    def _said(self, text: str, *, is_last: bool) -> Said:
        """What has become certain with this text, of calls the whole ones alone: their arguments are an object."""
        said = self._split.feed(text, is_last=is_last)
        calls = []
        for part in said.calls:
            begun, self._call = self._call, None
            call = part if begun is None else begun.joined(part)
            if call.is_whole:
                calls.append(call)
            else:
                self._call = call
        return said._replace(calls=tuple(calls))

    def _object(self, said: Said, *, is_done: bool) -> Json:
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        return {"model": self._model, "created_at": now, **self._part(said), "done": is_done}

    def _ending(self) -> Json:
        if self._last is None:
            return {"done_reason": "load"}
        statistics = self._last.statistics or {}
        first_s, rest_s = statistics.get("first_token_s", 0.0), statistics.get("decode_s", 0.0)
        return {
            "done_reason": self._last.finish_reason,
            "total_duration": _ns(first_s + rest_s),
            "load_duration": 0,
            "prompt_eval_count": statistics.get("prompt_tokens", 0),
            "prompt_eval_duration": _ns(first_s),
            "eval_count": statistics.get("completion_tokens", 0),
            "eval_duration": _ns(rest_s),
            "flowspec": {**statistics, "seed": self._seeds[0]},
        }


def _ns(seconds: float) -> int:
    return round(seconds * NS_PER_S)
