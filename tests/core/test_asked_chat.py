"""A message of a dialogue as the client asks for it, and its events."""

import pytest

from flowspec_edge.config import Piece
from flowspec_edge.core.answer_parts import TextLogprob, ToolCall
from flowspec_edge.core.asked_chat import AskedChat
from flowspec_edge.errors import ServerBusyError


def event(delta: dict[str, object], finish_reason: str | None = None, **more: object) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason, "token_ids": [7]}], **more}


def test_what_is_left_out_is_left_to_the_server() -> None:
    asked = AskedChat([{"role": "user", "content": "x"}], {"max_tokens": None, "temperature": 0.0, "tools": []})
    assert asked.request() == {
        "messages": [{"role": "user", "content": "x"}],
        "temperature": 0.0,
        "tools": [],
        "stream": True,
    }


def test_events_become_pieces() -> None:
    asked = AskedChat([], {})
    assert not asked.has_begun
    assert asked.take(event({"role": "assistant", "content": ""})).text == ""
    assert asked.has_begun
    assert asked.take(event({"reasoning_content": "hm"})) == Piece(text="", token_ids=[7], reasoning="hm")
    assert asked.take(event({"content": "a"})) == Piece(text="a", token_ids=[7])
    last = asked.take(event({}, "stop", flowspec={"trips": 3}))
    assert (last.finish_reason, last.statistics, asked.has_ended) == ("stop", {"trips": 3}, True)
    assert asked.take({"choices": [], "usage": {}}) == Piece(text="", token_ids=[])


def test_calls_of_tools_are_put_together() -> None:
    asked = AskedChat([], {})
    asked.take(event({"tool_calls": [{"index": 0, "id": "c1", "function": {"name": "look", "arguments": ""}}]}))
    asked.take(event({"tool_calls": [{"index": 1, "id": "c2", "function": {"name": "go", "arguments": "{}"}}]}))
    for part in ('{"at"', ": 1}"):
        asked.take(event({"tool_calls": [{"index": 0, "function": {"arguments": part}}]}))
    assert asked.tool_calls == [ToolCall("c1", "look", '{"at": 1}'), ToolCall("c2", "go", "{}")]
    assert asked.tool_calls[0].parsed() == {"at": 1}
    assert asked.tool_calls[1].told() == {"id": "c2", "type": "function", "function": {"name": "go", "arguments": "{}"}}


def test_a_call_that_was_cut_off_is_not_to_be_made() -> None:
    with pytest.raises(ValueError, match="JSON|Expecting|Unterminated"):
        ToolCall("c1", "look", '{"at').parsed()


def test_log_probabilities_are_gathered() -> None:
    asked = AskedChat([], {})
    entry = {"token": "a", "bytes": [97], "logprob": -0.5}
    chosen = {**event({"content": "a"})["choices"][0], "logprobs": {"content": [{**entry, "top_logprobs": [entry]}]}}  # type: ignore[index]
    asked.take({"choices": [chosen]})
    assert asked.logprobs == [TextLogprob(b"a", -0.5, {b"a": -0.5})]


def test_an_event_of_an_error_raises_it() -> None:
    with pytest.raises(ServerBusyError, match="full"):
        AskedChat([], {}).take({"error": {"message": "full", "type": "server_error", "code": "server_busy"}})
