"""How a model writes calls of tools: its own template is asked to write some, and what it wrote is looked at.

So a family needs no entry anywhere. Hermes and Qwen write ``<tool_call>`` and a JSON object, Llama 3 an object with
``parameters``, Mistral ``[TOOL_CALLS]`` and a list. Whose template tells nothing of tools gets a form of ours.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from flowspec_edge.errors import RequestError

Json = dict[str, Any]
Render = Callable[[Mapping[str, Any]], str]

PYTHON_TAG = "<|python_tag|>"
"""What models of Llama 3 may write before a call, though their template does not."""
ID_LENGTH = 9
"""Of the ids in templates that check them, which are Mistral's."""
_TAG = re.compile(r"<[^<>\s]+>|\[[A-Z_]+\]")


@dataclass(frozen=True, slots=True)
class CallForm:
    """Calls are ``begin``, the first one's name, ``middle`` and its arguments, a JSON object, for each further one
    ``between`` and the same again, and ``end``. Without a ``between`` one call is all that a message may have.

    Where it ``tells_ids`` an id may stand behind the arguments. Where it ``checks_ids`` they have ID_LENGTH letters and
    digits. It ``is_plain`` where the template tells nothing of tools.
    """

    begin: str
    middle: str
    end: str
    between: str | None = None
    tells_ids: bool = False
    checks_ids: bool = False
    is_plain: bool = False

    @property
    def mark(self) -> str:
        """What begins a call wherever it stands in a message. Where it is empty a call begins with the message."""
        tag = _TAG.match(self.begin)
        return "" if tag is None else tag[0]

    def __str__(self) -> str:
        return f"{self.begin}NAME{self.middle}{{...}}{self.end}"

    def new_id(self) -> str:
        """An id for a call, which the template takes when the call comes back."""
        if self.checks_ids:
            return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(ID_LENGTH))
        return f"call_{secrets.token_hex(12)}"


PLAIN_CALLS = CallForm(
    begin='<tool_call>\n{"name": "',
    middle='", "arguments": ',
    end="}\n</tool_call>",
    between='}\n</tool_call>\n<tool_call>\n{"name": "',
    is_plain=True,
)

_USER = {"role": "user", "content": "ask"}
_SAID = "answered"
_NAMES = ("first_probe", "second_probe")
_KEYS = ("first_key", "second_key")
_IDS = ("firstid01", "secondid2")
_LONG_ID = "call_0123456789"
_TOOLS = [
    {"type": "function", "function": {"name": name, "description": "none", "parameters": {"type": "object"}}}
    for name in _NAMES
]


def find_call_form(render: Render, ends: Collection[str]) -> CallForm:
    """The form of calls of a template, which ``render`` renders with given variables.

    ``ends`` are the texts of the tokens that end a message. PLAIN_CALLS where the template tells nothing of tools, or
    has calls of another kind.
    """
    try:
        said = _write(render, content=_SAID)
        one = _write(render, content="", tool_calls=_calls(1))
    except RequestError:
        return PLAIN_CALLS
    if _NAMES[0] not in said or said.count(_SAID) != 1:
        return PLAIN_CALLS
    before, _, after = said.partition(_SAID)
    form = _read(_behind(before, one), (after, *ends))
    if form is None:
        return PLAIN_CALLS
    return replace(form, between=_find_between(render, before, form), checks_ids=not _takes_any_id(render))


def _calls(num: int, ids: Collection[str] = _IDS) -> list[Json]:
    return [
        {"id": id, "type": "function", "function": {"name": name, "arguments": {key: 1}}}
        for id, name, key, _ in zip(ids, _NAMES, _KEYS, range(num), strict=False)
    ]


def _write(render: Render, **message: Any) -> str:
    answer = {"role": "assistant", **message}
    return render({"messages": [_USER, answer], "tools": _TOOLS, "add_generation_prompt": False})


def _behind(before: str, text: str) -> str:
    """What a text has that differs from another one that begins alike."""
    pairs = enumerate(zip(before, text, strict=False))
    return text[next((at for at, (one, other) in pairs if one != other), min(len(before), len(text))) :]


def _find_call(text: str, number: int) -> tuple[int, int, int] | None:
    """Where the name, the arguments and the rest begin of a call that is written there."""
    arguments = re.search(r"\{\s*" + f'"{_KEYS[number]}"' + r"\s*:\s*1\s*\}", text)
    if arguments is None:
        return None
    name = text.rfind(_NAMES[number], 0, arguments.start())
    return None if name < 0 else (name, *arguments.span())


def _read(text: str, ends: Collection[str]) -> CallForm | None:
    """The form of the one call in a message, which one of ``ends`` ends; None where it is not to be read."""
    if (found := _find_call(text, 0)) is None:
        return None
    name, start, stop = found
    rest, has_id = _without_id(text[stop:], 0)
    rest = rest[: min((at for end in ends if end and (at := rest.find(end)) >= 0), default=len(rest))]
    begin, middle = text[:name].lstrip(), text[name + len(_NAMES[0]) : start]
    if not begin or not middle or _IDS[0] in begin + middle + rest:
        return None
    return CallForm(begin, middle, rest.rstrip(), tells_ids=has_id)


def _without_id(text: str, number: int) -> tuple[str, bool]:
    without = re.sub(r',\s*"id"\s*:\s*' + f'"{_IDS[number]}"', "", text, count=1)
    return without, without != text


def _find_between(render: Render, before: str, form: CallForm) -> str | None:
    """What stands between two calls; None where the template refuses two, or writes the second one otherwise."""
    try:
        text = _behind(before, _write(render, content="", tool_calls=_calls(2)))
    except RequestError:
        return None
    first, second = _find_call(text, 0), _find_call(text, 1)
    if first is None or second is None or text[second[0] + len(_NAMES[1]) : second[1]] != form.middle:
        return None
    between, _ = _without_id(text[first[2] : second[0]], 0)
    return between


def _takes_any_id(render: Render) -> bool:
    try:
        _write(render, content="", tool_calls=_calls(1, [_LONG_ID]))
    except RequestError:
        return False
    return True
