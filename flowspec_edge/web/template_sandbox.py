"""Jinja's sandbox, in which the template of a model runs for some seconds, and makes texts of some size, at most."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from datetime import datetime
from types import FrameType
from typing import Any

import jinja2
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_STEPS = 2_000_000
"""Lines of Python that one rendering may run: a second or two, and a hundred times what the longest template of a known
model takes for a hundred messages.
"""
MAX_RENDER_S = 5.0
"""Lines that each do much are ended by this."""
MAX_CHARACTERS = 16 * 2**20
MAX_WIDTH = 1000
"""Of what is padded or indented."""
MAX_INDENT = 16
"""Of each level of JSON."""
MAX_BITS = 4096
"""Of a product."""


def build_environment() -> jinja2.Environment:
    """An environment for templates of chats, with what transformers gives them."""
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    for name in ("batch", "wordwrap", "urlize", "xmlattr"):  # can make much of little, and no template has them
        del environment.filters[name]
    del environment.globals["lipsum"]
    bounded = {"join": _join, "replace": _replace, "indent": _indent, "center": _center, "format": _format}
    environment.filters.update(bounded, tojson=_to_json)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


@contextmanager
def limited_steps() -> Iterator[None]:
    """Raise SecurityError in this thread as soon as it has run MAX_STEPS lines of Python, or for MAX_RENDER_S."""
    num_left, until = MAX_STEPS, time.monotonic() + MAX_RENDER_S

    def count(frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        nonlocal num_left
        num_left -= 1
        if num_left < 0 or time.monotonic() > until:
            raise SecurityError(f"it has run {MAX_STEPS} lines or {MAX_RENDER_S:.0f} s without an end")
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)


def check_size(num_characters: int) -> None:
    """Raises SecurityError where a text is too long."""
    if num_characters > MAX_CHARACTERS:
        raise SecurityError(f"it makes a text of more than {MAX_CHARACTERS} characters")


class _CodeGenerator(CodeGenerator):
    """Compiles ``a ~ b`` to a call of the environment, which can refuse it."""

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: jinja2.compiler.Frame) -> None:
        self.write("environment.concatenate((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, in which a short expression cannot take all memory either."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    code_generator_class = _CodeGenerator

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise SecurityError("powers are not computed")
        if operator == "*":
            _check_product(left, right)
        if operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
            check_size(len(left) + len(right))
        if operator == "%" and isinstance(left, str):
            _check_format(left)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """What the sandbox calls for ``format`` of a text."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(value.__self__)
        return wrapped

    def concatenate(self, values: Sequence[Any]) -> str:
        texts = [str(value) for value in values]
        check_size(sum(map(len, texts)))
        return "".join(texts)

    def call(self, context: jinja2.runtime.Context, called: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(text := getattr(called, "__self__", None), str):
            _check_call(text, called.__name__, args, kwargs)
        return super().call(context, called, *args, **kwargs)


def _check_product(left: Any, right: Any) -> None:
    sizes = [len(value) if isinstance(value, Sized) else value for value in (left, right)]
    if any(isinstance(value, Sized) for value in (left, right)):
        check_size(sizes[0] * sizes[1])
    elif all(isinstance(size, int) for size in sizes) and sum(size.bit_length() for size in sizes) > MAX_BITS:
        raise SecurityError(f"it computes numbers of more than {MAX_BITS} bits")


def _check_widths(widths: Iterable[Any]) -> None:
    for width in widths:
        if isinstance(width, int) and width > MAX_WIDTH:
            raise SecurityError(f"it pads a text to more than {MAX_WIDTH} characters")


def _check_format(text: str) -> None:
    if re.search(r"[%:.][^%:{}.]*(\d{4}|\*)", text) or re.search(r":[^{}]*\{", text):
        raise SecurityError("it pads a text without bound")


def _check_call(text: str, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """What a method of a text may make of it."""
    match method, args:
        case "replace", (str(old), str(new), *_):
            check_size(len(text) + text.count(old) * len(new))
        case "join", (parts,):
            _check_join(parts, text)
        case (("center" | "ljust" | "rjust" | "zfill" | "expandtabs"), _):
            _check_widths((*args, *kwargs.values()))
        case (("translate" | "format_map"), _):
            raise SecurityError(f"it calls {method} of a text")


def _check_join(parts: Any, between: str) -> None:
    if isinstance(parts, Sequence):
        check_size(sum(len(part) + len(between) for part in parts if isinstance(part, Sized)))
    else:
        raise SecurityError("it joins what is no list")


@jinja2.pass_eval_context
def _join(context: EvalContext, value: Iterable[Any], d: Any = "", attribute: Any = None) -> str:
    parts = list(value)
    _check_join(parts, str(d))
    return str(FILTERS["join"](context, parts, d, attribute))


def _replace(value: Any, old: Any, new: Any, count: int = -1) -> str:
    text = str(value)
    _check_call(text, "replace", (str(old), str(new)), {})
    return text.replace(str(old), str(new), count)


def _indent(value: Any, width: int | str = 4, *args: Any, **kwargs: Any) -> str:
    _check_widths([width])
    text = str(value)
    check_size(len(text) + (text.count("\n") + 1) * (width if isinstance(width, int) else len(width)))
    return str(FILTERS["indent"](text, width, *args, **kwargs))


def _center(value: Any, width: int = 80) -> str:
    _check_widths([width])
    return str(value).center(width)


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    _check_format(str(value))
    return str(FILTERS["format"](str(value), *args, **kwargs))


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant says, for trainers; nothing depends on it here."""

    tags = {"generation"}  # noqa: RUF012  # as the class above has it

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,  # templates give it by place
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers writes it; Jinja's own filter escapes what is special in HTML."""
    if (indent or 0) > MAX_INDENT or any(len(separator) > MAX_INDENT for separator in separators or ()):
        raise SecurityError(f"it indents JSON by more than {MAX_INDENT} characters")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
