"""What a client asks for, and for the rest of it after a loss."""

from dataclasses import replace
from typing import Any

import pytest

from flowspec_edge.config import GenerateOptions, Piece
from flowspec_edge.core.answer_parts import TextLogprob
from flowspec_edge.core.asked_text import AskedText, error_of
from flowspec_edge.errors import (
    FlowspecError,
    OtherBundleError,
    RequestError,
    ServerBusyError,
    StageFailedError,
)

OPTIONS = GenerateOptions(
    max_new_tokens=9,
    temperature=0.8,
    top_k=4,
    top_p=0.9,
    min_p=0.1,
    repetition_penalty=1.1,
    presence_penalty=0.2,
    frequency_penalty=0.3,
    logit_bias=((5, 1.5),),
    stop=("\n\n",),
    stop_token_ids=(6,),
    ignore_eos=True,
    min_tokens=2,
)
ASKED = {
    "max_tokens": 9,
    "temperature": 0.8,
    "top_k": 4,
    "top_p": 0.9,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.3,
    "logit_bias": {5: 1.5},
    "stop_token_ids": [6],
    "ignore_eos": True,
    "min_tokens": 2,
    "stop": ["\n\n"],
    "schedule": "flowspec",
    "stream": True,
}
BEGINNING = {"bundle": "ab", "prompt_token_ids": [1, 2], "seed": 77}


def event(text: str, token_ids: list[int], reason: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"text": text, "token_ids": token_ids, "finish_reason": reason}], **more}


def test_all_of_it_is_asked_for_with_the_seed_that_is_wanted_if_any() -> None:
    assert AskedText("x", OPTIONS, None, is_resumable=False).request() == {**ASKED, "prompt": "x", "seed": None}
    assert AskedText("x", OPTIONS, 5, is_resumable=True).request() == {
        **ASKED,
        "prompt": "x",
        "seed": 5,
        "flowspec": {"resumable": True},
    }


def test_the_rest_is_asked_for_by_tokens_and_with_the_seed_that_the_server_drew() -> None:
    text = AskedText("x", OPTIONS, None, is_resumable=True)
    assert text.can_go_on
    assert text.take(event("a", [7], flowspec=BEGINNING)) == Piece(text="a", token_ids=[7])
    text.take(event("", [8]))
    assert text.can_go_on
    assert text.request() == {
        **ASKED,
        "seed": 77,
        "flowspec": {
            "resumable": True,
            "resume": {"bundle": "ab", "prompt_token_ids": [1, 2], "token_ids": [7, 8]},
        },
    }
    assert (text.text, text.token_ids, text.has_ended) == ("a", [7, 8], False)


def test_log_probabilities_are_asked_for_and_gathered_with_the_bytes_of_tokens() -> None:
    text = AskedText("x", replace(OPTIONS, num_logprobs=2), 5, is_resumable=False)
    assert (
        text.request()["logprobs"] == 2 and "logprobs" not in AskedText("x", OPTIONS, 5, is_resumable=False).request()
    )
    told = {
        "tokens": ["a", "bytes:\\xe2\\x98", "bytes:a"],
        "token_logprobs": [-0.1, -0.2, -0.3],
        "top_logprobs": [{"a": -0.1, "b": -3.0}, {"bytes:\\xe2\\x98": -0.2}, {}],
        "text_offset": [0, 1, 1],
    }
    chosen = {"text": "a", "token_ids": [7, 8, 9], "finish_reason": None, "logprobs": told}
    text.take({"choices": [chosen]})
    text.take({"choices": [{**chosen, "logprobs": {**told, "top_logprobs": None}}]})
    assert text.logprobs[:3] == [
        TextLogprob(b"a", -0.1, {b"a": -0.1, b"b": -3.0}),
        TextLogprob(b"\xe2\x98", -0.2, {b"\xe2\x98": -0.2}),
        TextLogprob(b"bytes:a", -0.3, {}),
    ]
    assert [logprob.top for logprob in text.logprobs[3:]] == [{}] * 3


def test_the_last_event_has_the_statistics() -> None:
    text = AskedText("x", OPTIONS, 5, is_resumable=True)
    statistics = {"trips": 3, "seed": 5}
    assert text.take(event("b", [], "length", flowspec=statistics)) == Piece(
        text="b", token_ids=[], finish_reason="length", statistics=statistics
    )
    assert text.has_ended


def test_a_server_that_does_not_tell_the_beginning_cannot_be_followed() -> None:
    text = AskedText("x", OPTIONS, 5, is_resumable=True)
    text.take(event("a", [7]))
    assert not text.can_go_on


@pytest.mark.parametrize(
    ("status", "kind", "code", "expected"),
    [
        (400, "invalid_request_error", None, RequestError),
        (404, None, None, RequestError),
        (409, "invalid_request_error", "other_bundle", OtherBundleError),
        (429, "requests", "rate_limit_exceeded", ServerBusyError),
        (503, "server_error", "server_busy", ServerBusyError),
        (503, "server_error", "server_ending", StageFailedError),
        (503, "server_error", None, StageFailedError),
        (500, None, None, StageFailedError),
        (503, "invalid_request_error", None, RequestError),
    ],
)
def test_an_error_is_the_requests_fault_or_the_servers(
    status: int, kind: str | None, code: str | None, expected: type[FlowspecError]
) -> None:
    error = error_of({"error": {"message": "why", "type": kind, "code": code}}, status, 7.0)
    assert type(error) is expected and str(error) == "why"
    if isinstance(error, ServerBusyError):
        assert error.retry_after_s == 7.0


def test_an_error_within_a_stream_is_raised() -> None:
    text = AskedText("x", OPTIONS, 5, is_resumable=True)
    with pytest.raises(RequestError, match="too long"):
        text.take({"error": {"message": "too long", "type": "invalid_request_error"}})
