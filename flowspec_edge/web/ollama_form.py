"""Ollama's objects: one for each piece of an answer, and the last one with durations in nanoseconds and counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from flowspec_edge.config import Piece
from flowspec_edge.web.asked import TextGenerator
from flowspec_edge.web.chat import ChatTexts
from flowspec_edge.web.framing import Json
from flowspec_edge.web.reasoning import ReasoningSplit, Said

NS_PER_S = 1_000_000_000


def chat_part(said: Said) -> Json:
    """How ``/api/chat`` tells what is said."""
    thinking = {"thinking": said.reasoning} if said.reasoning else {}
    return {"message": {"role": "assistant", "content": said.content, **thinking}}


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
        self._split = ReasoningSplit(has_begun=asked.is_reasoning)
        self._part = part
        self._last: Piece | None = None

    def events(self, choice: int, piece: Piece) -> list[Json]:
        if piece.finish_reason is not None:
            self._last = piece
        said = self._split.feed(piece.text, is_last=piece.finish_reason is not None)
        return [self._object(said, is_done=False)] if any(said) else []

    def last_events(self) -> list[Json]:
        return [self._object(Said("", ""), is_done=True) | self._ending()]

    def whole(self, choices: Sequence[Piece]) -> Json:
        text = "".join(piece.text for piece in choices)
        self._last = choices[-1] if choices else None
        return self._object(self._split.feed(text, is_last=True), is_done=True) | self._ending()

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
