"""The fields of tools: those that the model may call, and whether it has to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from flowspec_edge.errors import FieldError
from flowspec_edge.web.fields import UNSUPPORTED
from flowspec_edge.web.json_schema import with_known_formats

MAX_TOOLS = 128
"""OpenAI's limit."""
NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")
"""OpenAI's rule, and dots, as names of some servers of tools have them."""
NAME_RULE = "must have 1 to 128 letters, digits, underscores, dashes and dots"
CHOICES = ("none", "auto", "required")
MODES = ("auto", "required")

Json = dict[str, Any]


class Function(msgspec.Struct, kw_only=True):
    """``parameters`` is a JSON schema, which calls are always made to follow, ``strict`` or not."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True):
    type: str = "function"
    function: Function | None = None


class NamedFunction(msgspec.Struct, kw_only=True):
    name: str


class NamedTool(msgspec.Struct, kw_only=True):
    type: str = "function"
    function: NamedFunction | None = None


class AllowedTools(msgspec.Struct, kw_only=True):
    """Those that may be called, of all that the model is told of: ``mode`` says whether one has to."""

    mode: str
    tools: list[NamedTool]


class ToolChoice(msgspec.Struct, kw_only=True):
    """The tool that is to be called, or those that may be."""

    type: str
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None


class OfferedTools(NamedTuple):
    """``told`` are the tools that the model is told of, in OpenAI's form. It may call those in ``callable``, some of
    them, by their places, and has to where it ``is_forced``.
    """

    told: list[Json]
    callable: list[int]
    is_forced: bool
    is_parallel: bool

    def name(self, place: int) -> str:
        return str(self.told[place]["function"]["name"])

    def schema(self, place: int) -> Json:
        """The JSON schema of the arguments."""
        given = self.told[place]["function"].get("parameters")
        if given is None:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return {**with_known_formats(given), "type": "object"}


def offered_tools(
    given: Sequence[Tool] | None, choice: str | ToolChoice | None, is_parallel: bool | None
) -> OfferedTools | None:
    """The tools that may be called, of the fields of chats that tell of them; None where none may.

    Raises:
        FieldError: one is none, two have one name, or what is to be called is not there.
    """
    tools = [_told(f"tools[{at}]", tool) for at, tool in enumerate(given or ())]
    if len(tools) > MAX_TOOLS:
        raise FieldError("tools", f"has {len(tools)} tools; it may have {MAX_TOOLS}")
    places: dict[str, int] = {}
    for place, tool in enumerate(tools):
        if (name := tool["function"]["name"]) in places:
            raise FieldError(f"tools[{place}].function.name", f"is {name!r}, and so is that of tool {places[name]}")
        places[name] = place
    if choice == "none" or (choice in (None, "auto") and not tools):
        return None
    is_forced = choice not in (None, "auto")
    if isinstance(choice, ToolChoice):
        wanted, is_forced = _chosen(choice, places)
    elif choice not in (None, *CHOICES):
        raise FieldError("tool_choice", f"is {choice!r:.80}; it must be one of {', '.join(CHOICES)}, or name a tool")
    elif not tools:
        raise FieldError("tool_choice", "asks for a call, and there are no tools")
    else:
        wanted = [*places.values()]
    return OfferedTools(tools, wanted, is_forced, is_parallel is not False)


def _chosen(choice: ToolChoice, places: Mapping[str, int]) -> tuple[list[int], bool]:
    """The places of the tools that may be called, and whether one has to be."""
    match choice:
        case ToolChoice(type="function"):
            return [_place_of("tool_choice", choice, places)], True
        case ToolChoice(type="allowed_tools", allowed_tools=AllowedTools(mode=mode, tools=tools)):
            name = "tool_choice.allowed_tools"
            if mode not in MODES:
                raise FieldError(f"{name}.mode", f"is {mode!r:.80}; it must be one of {', '.join(MODES)}")
            if not 1 <= len(tools) <= MAX_TOOLS:
                raise FieldError(f"{name}.tools", f"has {len(tools)} tools; it must have 1 to {MAX_TOOLS}")
            allowed = {_place_of(f"{name}.tools[{at}]", tool, places) for at, tool in enumerate(tools)}
            return sorted(allowed), mode == "required"
        case ToolChoice(type="allowed_tools"):
            raise FieldError("tool_choice.allowed_tools", "is missing", "missing_required_parameter")
    fault = f"is {choice.type!r:.80}; it may be 'function' or 'allowed_tools'"
    raise FieldError("tool_choice.type", fault, UNSUPPORTED)


def _place_of(name: str, named: ToolChoice | NamedTool, places: Mapping[str, int]) -> int:
    """The place of a tool that the caller names there."""
    if named.type != "function":
        raise FieldError(f"{name}.type", f"is {named.type!r:.80}; it may be 'function'", UNSUPPORTED)
    if named.function is None:
        raise FieldError(f"{name}.function", "is missing", "missing_required_parameter")
    if (tool := named.function.name) not in places:
        known = ", ".join(places) or "none"
        raise FieldError(f"{name}.function.name", f"is {tool!r:.80}, which is none of the tools ({known:.200})")
    return places[tool]


def _told(name: str, tool: Tool) -> Json:
    """A tool as templates know it. ``name`` is how the caller names it."""
    if tool.type != "function":
        raise FieldError(f"{name}.type", f"is {tool.type!r:.80}; it may be 'function'", UNSUPPORTED)
    if tool.function is None:
        raise FieldError(f"{name}.function", "is missing", "missing_required_parameter")
    function = tool.function
    if NAME.fullmatch(function.name) is None:
        raise FieldError(f"{name}.function.name", f"is {function.name!r:.80}; it {NAME_RULE}")
    kind = "object" if function.parameters is None else function.parameters.get("type", "object")
    if kind != "object":
        raise FieldError(f"{name}.function.parameters", f"is of type {kind!r:.80}; arguments are an object")
    names = ("name", "description", "parameters")
    told = {name: value for name in names if (value := getattr(function, name)) is not None}
    return {"type": "function", "function": told}
