"""Calls in a dialogue have ids that its template takes, and results have those of their calls."""

from flowspec_edge.web.call_form import PLAIN_CALLS
from flowspec_edge.web.call_ids import with_ids
from tests.web.served import Json
from tests.web.test_call_form import FORMS

MISTRAL = FORMS["Mistral 0.3"]


def calls(*ids: str) -> Json:
    return {"role": "assistant", "content": "", "tool_calls": [{"id": id, "function": {"name": "f"}} for id in ids]}


def result(id: str | None = None) -> Json:
    return {"role": "tool", "content": "1"} | ({} if id is None else {"tool_call_id": id})


def ids_of(messages: list[Json]) -> list[str]:
    return [
        id
        for message in messages
        for id in [*(call["id"] for call in message.get("tool_calls", ())), message.get("tool_call_id")]
        if id is not None
    ]


def test_calls_without_ids_are_numbered_and_results_follow_them() -> None:
    told = with_ids([calls("", ""), result(), result(), calls(""), result()], MISTRAL)
    first, second, third = "000000000", "000000001", "000000002"
    assert ids_of(told) == [first, second, first, second, third, third]


def test_ids_that_a_template_would_refuse_become_others_always_the_same() -> None:
    dialogue = [calls("call_0123456789", "a1B2c3D4e"), result("a1B2c3D4e"), result("call_0123456789")]
    told = ids_of(with_ids(dialogue, MISTRAL))
    assert told[0] == told[3] != told[1] == told[2] == "a1B2c3D4e"
    assert len(told[0]) == 9 and told[0].isalnum()
    longer = [*dialogue, calls("call_9"), result("call_9")]
    assert ids_of(with_ids(longer, MISTRAL))[:4] == told, "a dialogue that goes on begins as before"
    assert ids_of(with_ids(dialogue, PLAIN_CALLS)) == ids_of(dialogue)
    assert with_ids([result()], MISTRAL)[0]["tool_call_id"] == "", "there is no call that it could be of"
