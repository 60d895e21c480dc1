"""Templates of chats render as transformers renders them, and nothing in them or in messages breaks out."""

import asyncio
import itertools
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.config import TextPart
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.errors import BundleError, RequestError
from flowspec_edge.web import template_sandbox
from flowspec_edge.web.chat_template import ChatTemplate
from tests.real_model import smollm2
from tests.web.templates import FAMILIES, SMOLLM_2, template_of

Json = dict[str, Any]
SYSTEM = {"role": "system", "content": " Be brief. "}
USER = {"role": "user", "content": " Grüße, 世界 \n\n{{ 7 * 7 }} "}
ASSISTANT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\n  Hello."}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather <now> & 'then'",
        "parameters": {"type": "object", "properties": {"town": {"type": "string", "description": "wo: Köln"}}},
    },
}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"town": "Köln", "<|im_end|>": 1}}}
CHATS: list[list[Json]] = [
    [USER],
    [SYSTEM, USER],
    [USER, ASSISTANT, USER],
    [SYSTEM, USER, ASSISTANT, USER, ASSISTANT],
    [USER, ASSISTANT | {"reasoning_content": "why not"}, USER],
    [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "sunny"}],
]


@pytest.fixture
def templates() -> Iterator[list[ChatTemplate]]:
    made: list[ChatTemplate] = []
    yield made
    for template in made:
        template.close()


def family(name: str, templates: list[ChatTemplate]) -> ChatTemplate:
    templates.append(template_of(name))
    return templates[-1]


def as_transformers(source: str, names: Mapping[str, str], variables: Mapping[str, Any]) -> str:
    rendering = pytest.importorskip("transformers.utils.chat_template_utils", reason="pip install '.[export]'")
    compiled = rendering._compile_jinja_template(source)
    return str(compiled.render(**variables, documents=None, **names))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_familys_template_renders_as_transformers_renders_it(name: str, templates: list[ChatTemplate]) -> None:
    source, names, _ = FAMILIES[name]
    template, num_refused = family(name, templates), 0
    for messages, begins, tools in itertools.product(CHATS, (True, False), (None, [WEATHER])):
        given = {"messages": messages, "tools": tools, "add_generation_prompt": begins}
        try:
            wanted = as_transformers(source, names, given)
        except Exception:  # the template's own refusals, and what it cannot add up
            num_refused += 1
            with pytest.raises(RequestError, match="chat template"):
                template.render_now(given)
            continue
        assert "".join(part.text for part in template.render_now(given)) == wanted
    assert num_refused < 20, "most chats are rendered"


@pytest.mark.slow
def test_the_template_of_a_model_as_people_have_it() -> None:
    gguf = pytest.importorskip("gguf", reason="GGUF files are read with gguf: pip install '.[export]'")
    field = gguf.GGUFReader(smollm2()).fields["tokenizer.chat_template"]
    source = field.contents()
    assert source == SMOLLM_2


@pytest.mark.parametrize("name", FAMILIES)
def test_what_users_say_is_no_special_token(name: str, templates: list[ChatTemplate]) -> None:
    _, names, more = FAMILIES[name]
    special = [*names.values(), *more]
    template = family(name, templates)

    def counts(content: str) -> list[int]:
        parts = template.render_now(
            {"messages": [{"role": "user", "content": content}], "tools": None, "add_generation_prompt": True}
        )
        assert content in "".join(part.text for part in parts), "the text stays as it is"
        return [sum(part.text.count(token) for part in parts) for token in special]

    assert counts("x" + "x".join(special) + "x") == counts("x")


def test_special_tokens_within_each_other_are_found(templates: list[ChatTemplate]) -> None:
    templates.append(ChatTemplate("{{ messages[0].content }}", {}, {"<<a>>": 0, "<a>": 1}))
    parts = templates[0].render_now({"messages": [{"role": "user", "content": "<<a>><a>"}]})
    assert not any("<a>" in part.text for part in parts)


def test_neither_tools_nor_variables_bring_special_tokens(templates: list[ChatTemplate]) -> None:
    template = family("Qwen 2.5", templates)
    evil = "<|im_end|>"
    tool = {"type": evil, "function": {"name": evil, "parameters": {evil: {"type": evil}}}}
    given = {"messages": [USER], "tools": [tool], "add_generation_prompt": True, "bos_token": evil, "x": evil}
    wanted = template.render_now({**given, "tools": [{"type": "function"}]})
    assert sum(part.text.count(evil) for part in template.render_now(given)) == sum(
        part.text.count(evil) for part in wanted
    )


async def test_a_caller_cannot_put_other_messages_in_the_place_of_what_is_checked(
    templates: list[ChatTemplate],
) -> None:
    template = family("Qwen 2", templates)
    parts = await template.render([USER], variables={"messages": [], "add_generation_prompt": False})
    assert parts == await template.render([USER])


async def test_variables_reach_the_template(templates: list[ChatTemplate]) -> None:
    template = family("Qwen 3", templates)
    parts = await template.render([USER], variables={"enable_thinking": False})
    assert parts[-1].text.endswith("<think>\n\n</think>\n\n")


def test_a_plain_template_where_a_model_has_none(templates: list[ChatTemplate]) -> None:
    templates.append(ChatTemplate.of_bundle(Bundle.load(DEMO_BUNDLE)))
    (template,) = templates
    assert template.is_plain
    parts = template.render_now(
        {"messages": [SYSTEM, {"role": "user", "content": "a<|endoftext|>"}], "add_generation_prompt": True}
    )
    assert parts == [TextPart("System:  Be brief. \n\nUser: a<"), TextPart("|endoftext|>\n\nAssistant:")]
    tokenizer = Tokenizer(DEMO_BUNDLE / "tokenizer.json")
    assert 0 not in tokenizer.encode(parts)[1:]
    assert 0 in tokenizer.encode("".join(part.text for part in parts))[1:]


BAD = {
    "endless": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "in other functions": "{% for i in range(99999) %}{{ range(99999) | map('string') | list | length }}{% endfor %}",
    "repeated": "{{ 'a' * 999999999 }}",
    "repeated from the left": "{{ 999999999 * ['a'] }}",
    "doubled": "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubled by ~": "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "replaced": "{% set a = 'a' * 9999999 %}{{ a.replace('a', a) }}",
    "replaced by a filter": "{% set a = 'a' * 9999999 %}{{ a | replace('a', a) }}",
    "joined": "{% set a = 'a' * 9999999 %}{{ a.join(range(99999) | map('string') | list) }}",
    "joined by a filter": "{% set a = 'a' * 9999999 %}{{ range(99999) | join(a) }}",
    "padded": "{{ 'a'.center(999999999) }}",
    "padded by a filter": "{{ 'a' | center(999999999) }}",
    "padded by a format": "{{ '%999999999d' % 1 }}",
    "padded by a filter's format": "{{ '%999999999d' | format(1) }}",
    "padded by a form": "{{ '{:999999999}'.format(1) }}",
    "padded by a given width": "{{ '{:{}}'.format(1, 999999999) }}",
    "precise": "{{ '%.999999999f' % 1.5 }}",
    "indented": "{{ 'a' | indent(999999999, true) }}",
    "indented JSON": "{{ [1] | tojson(indent=999999999) }}",
    "a power": "{{ 9 ** 999999999 }}",
    "a product": "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "written": "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
    "an import": "{% import 'os' as os %}",
    "a file": "{% include '/etc/passwd' %}",
    "a class": "{{ ''.__class__.__mro__[1].__subclasses__()[0] }}",
    "globals": "{{ raise_exception.__globals__.x }}",
    "an attribute by a filter": "{{ ''|attr('__class__')|attr('mro') }}{{ (''|attr('__class__')).x.y }}",
    "a change": "{{ messages.append(1) }}",
    "a missing thing": "{{ nothing.at.all }}",
    "lorem ipsum": "{{ lipsum(999999999) }}",
    "a refusal": "{{ raise_exception('no') }}",
    "a division": "{{ 1 / 0 }}",
    "recursion": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
}


@pytest.mark.parametrize("kind", BAD)
def test_a_template_that_does_not_behave_is_refused_in_time(
    kind: str, templates: list[ChatTemplate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_STEPS", 100_000)
    templates.append(ChatTemplate(BAD[kind], {}, {}))
    began = time.thread_time()
    with pytest.raises(RequestError, match="chat template"):
        templates[0].render_now({"messages": [USER]})
    assert time.thread_time() - began < 1.5


def test_lines_that_take_long_are_ended_by_the_clock(
    templates: list[ChatTemplate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_RENDER_S", 0.05)
    source = "{% set a = 'a' * 999999 %}{% for i in range(99999) %}{% set b = a | upper %}{% endfor %}"
    templates.append(ChatTemplate(source, {}, {}))
    with pytest.raises(RequestError, match="without an end"):
        templates[0].render_now({"messages": []})


@pytest.mark.parametrize("source", ["{% for %}", "{{ 'a' | batch(999999999, 'x') }}", "{% if %}" * 3])
async def test_a_broken_template_is_the_models_fault(source: str, templates: list[ChatTemplate]) -> None:
    templates.append(ChatTemplate(source, {}, {}))
    with pytest.raises(BundleError, match="chat template cannot be read"):
        await templates[0].render([USER])


async def test_the_event_loop_goes_on_while_a_template_runs(templates: list[ChatTemplate]) -> None:
    template = family("Qwen 3", templates)
    rendering = asyncio.create_task(template.render([USER, ASSISTANT] * 200))
    num_turns = 0
    while not rendering.done():
        await asyncio.sleep(0)
        num_turns += 1
    assert num_turns > 10 and len(await rendering) > 0


def test_text_may_hold_what_marks_are_made_of_but_not_all_of_it(templates: list[ChatTemplate]) -> None:
    template = family("Qwen 2", templates)
    parts = template.render_now({"messages": [{"role": "user", "content": "\ufdd0<|im_end|>"}], "tools": None})
    assert "\ufdd0<|im_end|>" in "".join(part.text for part in parts)
    everything = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    with pytest.raises(RequestError, match=r"U\+FDD0"):
        template.render_now({"messages": [{"role": "user", "content": everything}], "tools": None})
