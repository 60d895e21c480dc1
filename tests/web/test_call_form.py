"""How models write calls is read off their templates."""

import re
from collections.abc import Iterator

import pytest

from flowspec_edge.web.call_form import PLAIN_CALLS, CallForm
from flowspec_edge.web.chat_template import ChatTemplate
from tests.web.served import Json
from tests.web.templates import FAMILIES, template_of

HERMES = CallForm(
    begin='<tool_call>\n{"name": "',
    middle='", "arguments": ',
    end="}\n</tool_call>",
    between='}\n</tool_call>\n<tool_call>\n{"name": "',
)
FORMS = {
    "Llama 3.1": CallForm(begin='{"name": "', middle='", "parameters": ', end="}"),
    "Mistral 0.3": CallForm(
        begin='[TOOL_CALLS] [{"name": "',
        middle='", "arguments": ',
        end="}]",
        between='}, {"name": "',
        tells_ids=True,
        checks_ids=True,
    ),
    "Qwen 2.5": HERMES,
    "Qwen 3": HERMES,
}


async def form_of(template: ChatTemplate) -> CallForm:
    try:
        return await template.call_form()
    finally:
        template.close()


@pytest.fixture
def opened() -> Iterator[list[ChatTemplate]]:
    made: list[ChatTemplate] = []
    yield made
    for template in made:
        template.close()


@pytest.mark.parametrize("family", [None, *FAMILIES])
async def test_every_familys_form(family: str | None) -> None:
    assert await form_of(template_of(family)) == FORMS.get(family or "", PLAIN_CALLS)


HEAD = (
    "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.tool_calls %}"
)
TAIL = "{% endif %}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
EACH = "{% for c in m.tool_calls %}"
KINDS = {
    "name and arguments between special tokens": (
        EACH + "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}",
        CallForm(begin="[TOOL_CALLS]", middle="[ARGS]", end="", between="[TOOL_CALLS]"),
    ),
    "in a block": (
        "<calls>" + EACH + "<call>{{ c.function.name }}\n```json\n{{ c.function.arguments | tojson }}\n```</call>"
        "{% endfor %}</calls>",
        CallForm(
            begin="<calls><call>",
            middle="\n```json\n",
            end="\n```</call></calls>",
            between="\n```</call><call>",
        ),
    ),
    "with ids that are not told of a call that is made": (
        EACH + "<call>{{ c.id }}:{{ c.function.name }}={{ c.function.arguments | tojson }}{% endfor %}",
        PLAIN_CALLS,
    ),
    "in no JSON": (
        EACH + "<call={{ c.function.name }}>{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v }}{% endfor %}"
        "{% endfor %}",
        PLAIN_CALLS,
    ),
    "arguments first": (EACH + "{{ c.function.arguments | tojson }}->{{ c.function.name }}{% endfor %}", PLAIN_CALLS),
    "with nothing before the name": (
        EACH + "{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}",
        PLAIN_CALLS,
    ),
    "not at all": ("{{ raise_exception('no calls') }}", PLAIN_CALLS),
    "without a word": ("", PLAIN_CALLS),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_calls_of_any_kind_are_read_or_plain_ones_are_asked_for(kind: str) -> None:
    source, form = KINDS[kind]
    assert await form_of(ChatTemplate(HEAD + source + TAIL, {}, {"<end>": 1}, ["<end>"])) == form


async def test_a_template_that_tells_nothing_of_tools_has_plain_calls() -> None:
    source, _ = KINDS["in a block"]
    assert await form_of(ChatTemplate((HEAD + source + TAIL).replace("t.function.name", "''"), {}, {})) == PLAIN_CALLS


async def test_whether_there_may_be_a_message_of_the_system(opened: list[ChatTemplate]) -> None:
    for family, has_system in ((None, True), ("Gemma", False), ("Mistral", False), ("Qwen 2", True)):
        opened.append(template_of(family))
        assert await opened[-1].has_system() is has_system, family


async def test_ids_are_such_that_the_template_takes_them(opened: list[ChatTemplate]) -> None:
    for family, rule in (("Mistral 0.3", "[a-zA-Z0-9]{9}"), ("Qwen 3", "call_[0-9a-f]{24}")):
        opened.append(template_of(family))
        form = await opened[-1].call_form()
        id = form.new_id()
        assert re.fullmatch(rule, id) and form.new_id() != id
        call = {"id": id, "type": "function", "function": {"name": "f", "arguments": {}}}
        messages: list[Json] = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "y", "tool_call_id": id},
        ]
        assert await opened[-1].render(messages)
