"""OpenAI's ``response`` object of one answer, and the events of a stream, in their sequence."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from flowspec_edge.config import Piece
from flowspec_edge.web.asked import TextGenerator
from flowspec_edge.web.chat import ChatTexts
from flowspec_edge.web.framing import Json
from flowspec_edge.web.message_split import CallPart
from flowspec_edge.web.refusals import Refusal


class ResponseForm:
    """``about`` is what the answer repeats of the request."""

    def __init__(self, generator: TextGenerator, asked: ChatTexts, about: Json) -> None:
        options = asked.texts[0].options
        self._seed = options.seed
        self._split = asked.split()
        self._num_events = 0
        self._output: list[Json] = []
        self._has_begun = False
        self._writes: str | None = None  # which item: its type, or a call's id
        self._response: Json = {
            "id": f"resp_{secrets.token_hex(24)}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": generator.model,
            "output": self._output,
            "previous_response_id": None,
            "store": False,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "truncation": "disabled",
            "usage": None,
            **about,
        }

    def events(self, choice: int, piece: Piece) -> list[Json]:
        events: list[Json] = []
        if not self._has_begun:
            self._has_begun = True
            begun = {**self._response, "output": []}
            events += [self._event(kind, response=begun) for kind in ("created", "in_progress")]
        is_last = piece.finish_reason is not None
        said = self._split.feed(piece.text, is_last=is_last)
        for kind, text in (("reasoning", said.reasoning), ("message", said.content)):
            if text:
                events += [*self._go_to(kind, _item(kind, "", "in_progress")), *self._written(text)]
        for call in said.calls:
            if call.is_first:
                events += self._go_to(call.id, _call_item(call, "in_progress"))
            events += self._written(call.arguments)
        if is_last:
            if not self._output:
                events += self._go_to("message", _item("message", "", "in_progress"))
            events += self._go_to(None, is_whole=piece.finish_reason != "length")
            self._finish(piece)
            events.append(self._event(str(self._response["status"]), response=self._response))
        return events

    def last_events(self) -> list[Json]:
        return []

    def whole(self, choices: Sequence[Piece]) -> Json:
        (piece,) = choices
        said = self._split.feed(piece.text, is_last=True)
        status = "incomplete" if piece.finish_reason == "length" else "completed"
        if said.reasoning:
            self._output.append(_item("reasoning", said.reasoning))
        if said.content or not (said.reasoning or said.calls):
            self._output.append(_item("message", said.content, status))
        for call in said.calls:
            item = _call_item(call, "completed" if call.is_whole else status)
            self._output.append({**item, "arguments": call.arguments})
        self._finish(piece)
        return self._response

    def failed(self, refusal: Refusal) -> Json:
        """The event that ends a stream early."""
        error = {"code": "server_error", "message": refusal.message}
        self._response |= {"status": "failed", "error": error}
        return self._event("failed", response=self._response)

    def _event(self, kind: str, **fields: Any) -> Json:
        event = {"type": f"response.{kind}", "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return event

    def _go_to(self, name: str | None, item: Json | None = None, *, is_whole: bool = True) -> list[Json]:
        """End the item that is written, and begin this one, where it is another one."""
        if name == self._writes:
            return []
        events = [] if self._writes is None else self._item_done(is_whole=is_whole)
        self._writes = name
        if item is not None:
            self._output.append(item)
            at = len(self._output) - 1
            begun = {name: [] if name == "content" else value for name, value in item.items()}
            events.append(self._event("output_item.added", output_index=at, item=begun))
            if "content" in item:
                events.append(self._event("content_part.added", **self._place(), part=dict(item["content"][0])))
        return events

    def _written(self, text: str) -> list[Json]:
        """The item that is written goes on."""
        item = self._output[-1]
        if item["type"] == "function_call":
            item["arguments"] += text
            return [self._event("function_call_arguments.delta", **self._place(), delta=text)]
        (part,) = item["content"]
        part["text"] += text
        return [self._event(f"{part['type']}.delta", **self._place(), delta=text, **_no_logprobs(part))]

    def _item_done(self, *, is_whole: bool) -> list[Json]:
        item = self._output[-1]
        item["status"] = "completed" if is_whole else "incomplete"
        if item["type"] == "function_call":
            named = {"name": item["name"], "arguments": item["arguments"]}
            events = [self._event("function_call_arguments.done", **self._place(), **named)]
        else:
            (part,) = item["content"]
            events = [
                self._event(f"{part['type']}.done", **self._place(), text=part["text"], **_no_logprobs(part)),
                self._event("content_part.done", **self._place(), part=part),
            ]
        return [*events, self._event("output_item.done", output_index=len(self._output) - 1, item=item)]

    def _place(self) -> Json:
        item = self._output[-1]
        place = {"item_id": item["id"], "output_index": len(self._output) - 1}
        return place | ({"content_index": 0} if "content" in item else {})

    def _finish(self, piece: Piece) -> None:
        statistics = piece.statistics or {}
        read, written = statistics.get("prompt_tokens", 0), statistics.get("completion_tokens", 0)
        is_cut = piece.finish_reason == "length"
        self._response |= {
            "status": "incomplete" if is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "usage": {
                "input_tokens": read,
                "input_tokens_details": {"cached_tokens": statistics.get("cached_tokens", 0), "cache_write_tokens": 0},
                "output_tokens": written,
                "output_tokens_details": {} if self._output[0]["type"] == "reasoning" else {"reasoning_tokens": 0},
                "total_tokens": read + written,
            },
            "flowspec": {**statistics, "seed": self._seed},
        }


def _item(kind: str, text: str, status: str = "completed") -> Json:
    if kind == "reasoning":
        part: Json = {"type": "reasoning_text", "text": text}
        return {"id": f"rs_{secrets.token_hex(24)}", "type": kind, "summary": [], "content": [part], "status": status}
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {
        "id": f"msg_{secrets.token_hex(24)}",
        "type": kind,
        "role": "assistant",
        "content": [part],
        "status": status,
    }


def _call_item(call: CallPart, status: str) -> Json:
    """The item of a call, before its arguments."""
    return {
        "id": f"fc_{secrets.token_hex(24)}",
        "type": "function_call",
        "call_id": call.id,
        "name": call.name,
        "arguments": "",
        "status": status,
    }


def _no_logprobs(part: Mapping[str, Any]) -> Json:
    return {"logprobs": []} if part["type"] == "output_text" else {}
