"""Renders the messages of a chat as a model's own template writes them, as transformers does.

Templates come with models, from anywhere: they are rendered in a sandbox, on a thread. What users say is never read as
a special token, whatever it looks like.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import jinja2
import msgspec

from flowspec_edge.bundle import Bundle
from flowspec_edge.config import TextPart
from flowspec_edge.errors import BundleError, RequestError
from flowspec_edge.web.call_form import CallForm, find_call_form
from flowspec_edge.web.template_sandbox import build_environment, check_size, limited_steps

_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Characters that Unicode keeps for use within a program, and that no text has."""

PLAIN = """\
{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}

{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"""
"""For models without a template of their own. Base models go on with a dialogue in this form."""

_PROBE = "be a probe"
Message = Mapping[str, Any]


class ChatTemplate:
    """A model's template. ``names`` are its variables of special tokens, as ``bos_token``, with their texts.

    ``special`` has the ids of all texts that the tokenizer reads as special tokens, and ``ends`` those of them that end
    a message. Without a ``source`` the template is plain. A broken one is found when it is first used, for other texts
    can be written without it.
    """

    def __init__(
        self, source: str | None, names: Mapping[str, str], special: Mapping[str, int], ends: Iterable[str] = ()
    ) -> None:
        self.is_plain = source is None
        self.special = special
        self._source = PLAIN if source is None else source
        self._names = dict(names)
        self._by_length = sorted(special, key=len, reverse=True)
        self._ends = [*ends]
        self._thread = ThreadPoolExecutor(1, "chat-template")

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> Self:
        """The template of a bundle, whose tokenizer is read for it. Takes 50 ms for a vocabulary of 150,000 tokens.

        Raises:
            BundleError: the tokenizer cannot be read.
        """
        manifest, path = bundle.manifest, bundle.directory / bundle.manifest.tokenizer.file
        return cls.of_tokenizer(manifest.chat_template, path, manifest.bos_token_id, manifest.eos_token_ids)

    @classmethod
    def of_tokenizer(
        cls, source: str | None, path: Path, bos_token_id: int | None, eos_token_ids: Sequence[int]
    ) -> Self:
        """A template with the special tokens of the ``tokenizer.json`` at ``path``.

        Raises:
            BundleError: the tokenizer cannot be read.
        """
        try:
            added = msgspec.json.decode(path.read_bytes(), type=_Tokenizer).added_tokens or []
        except (OSError, msgspec.DecodeError) as cause:
            raise BundleError(f"{path}: not a tokenizer ({cause}); export the bundle again") from cause
        texts = {token.id: token.content for token in added}
        ids = {"bos_token": bos_token_id, "eos_token": next(iter(eos_token_ids), None)}
        names = {name: texts[token] for name, token in ids.items() if token in texts}
        special = {token.content: token.id for token in added if token.special and token.content}
        ends = [texts[token] for token in eos_token_ids if token in texts]
        return cls(source, names, special, ends)

    async def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[TextPart]:
        """The prompt of a chat, written on a thread, one after the other.

        Args:
            messages: with ``role`` and ``content``, and what else the template knows of.
            tools: functions that the model may call, in OpenAI's form.
            add_generation_prompt: end where the assistant's next message begins.
            variables: further ones of the template, as ``enable_thinking``.

        Raises:
            BundleError: it is no template.
            RequestError: the template refuses these messages, or takes too long over them.
        """
        given = {
            **(variables or {}),
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.render_now, given)

    def render_message(self, text: str) -> list[TextPart]:
        """The prompt of a chat that a user begins with ``text``; raises what :meth:`render` does."""
        messages = [{"role": "user", "content": text}]
        return self.render_now({"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True})

    def render_now(self, given: Mapping[str, Any]) -> list[TextPart]:
        """The prompt for these variables; takes and raises what :meth:`render` does, MAX_RENDER_S at most."""
        said = "\n".join(_texts_in(given))
        mark = next((mark for mark in _MARKS if mark not in said), None)
        if mark is None:
            raise RequestError("the messages have all of the characters U+FDD0 to U+FDEF, which stand for no text")
        splits = {token: token[:1] + mark + token[1:] for token in self._by_length if token in said}

        def hide(text: str) -> str:
            """Split what looks like a special token, so that it is none. No step of it takes long."""
            for token, split in splits.items():
                text = text.replace(token, split)
            return text

        try:
            text = self._write({**_map_texts(given, hide), **self._names})
        except jinja2.TemplateError as cause:
            raise RequestError(f"the model's chat template refuses these messages: {cause}") from cause
        except (
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
            MemoryError,
        ) as cause:
            raise RequestError(f"the model's chat template fails on these messages ({cause})") from cause
        return [TextPart(part) for part in text.split(mark) if part]

    async def call_form(self) -> CallForm:
        """How the model writes calls of tools. Raises BundleError where the template cannot be read."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: self._call_form)

    async def has_system(self) -> bool:
        """Whether there may be a message of the system. Raises BundleError where the template cannot be read."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: self._has_system)

    @functools.cached_property
    def _call_form(self) -> CallForm:
        return find_call_form(self._rendered, self._ends)

    @functools.cached_property
    def _has_system(self) -> bool:
        messages = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "ask"}]
        try:
            return _PROBE in self._rendered({"messages": messages, "tools": None, "add_generation_prompt": True})
        except RequestError:
            return False

    def _rendered(self, given: Mapping[str, Any]) -> str:
        return "".join(part.text for part in self.render_now(given))

    def close(self) -> None:
        """End the thread, once what it writes is written."""
        self._thread.shutdown(wait=False)

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        try:
            return build_environment().from_string(self._source)
        except (jinja2.TemplateError, RecursionError) as cause:
            raise BundleError(f"the model's chat template cannot be read ({cause})") from cause

    def _write(self, given: dict[str, Any]) -> str:
        pieces: list[str] = []
        num_characters = 0
        template = self._template
        with limited_steps():
            for piece in template.generate(given):
                num_characters += len(piece)
                check_size(num_characters)
                pieces.append(piece)
        return "".join(pieces)


class _AddedToken(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _Tokenizer(msgspec.Struct):
    """Of a ``tokenizer.json``, what is read here."""

    added_tokens: list[_AddedToken] | None = None


def _texts_in(value: Any) -> Iterator[str]:
    """All texts in plain data, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _texts_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts_in(inner)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of plain data with all its texts changed, names of fields included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _map_texts(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_map_texts(inner, change) for inner in value]
    return value
