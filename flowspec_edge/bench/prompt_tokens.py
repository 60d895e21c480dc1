"""The tokens of a prompt: of source text as it is, and of a message as the model's chat template has it."""

from __future__ import annotations

from flowspec_edge.bench.prompts import load_prompts
from flowspec_edge.bundle import Bundle
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.errors import BenchError
from flowspec_edge.web.chat_template import ChatTemplate


class PromptTokens:
    def __init__(self, bundle: Bundle) -> None:
        self._tokenizer = Tokenizer(bundle.directory / bundle.manifest.tokenizer.file)
        self._template = ChatTemplate.of_bundle(bundle)
        self._max_context = bundle.manifest.geometry.max_context

    def of(self, name: str, text: str, *, is_message: bool) -> list[int]:
        """The tokens of the prompt ``name``, whose text may be a message.

        Raises:
            BenchError: it leaves no room in the model's context, or the model is not for messages.
        """
        if is_message and self._template.is_plain:
            raise BenchError(
                f"{name} is a message to a chat model, and the bundle has no chat template; choose other sets, of "
                f"{', '.join(load_prompts())}"
            )
        tokens = self._tokenizer.encode(self._template.render_message(text) if is_message else text)
        if not 0 < len(tokens) < self._max_context:
            raise BenchError(
                f"{name} has {len(tokens)} tokens; the bundle's context allows 1 to {self._max_context - 1}: take "
                "another bundle"
            )
        return tokens
