"""Ollama's paths that tell what is served: one model, which is always loaded."""

from __future__ import annotations

import msgspec
from aiohttp import web

from flowspec_edge.errors import FieldError
from flowspec_edge.version import __version__
from flowspec_edge.web.fields import OwnFields, parse_fields, read_body
from flowspec_edge.web.framing import Json
from flowspec_edge.web.model_card import ModelCard
from flowspec_edge.web.ollama import LATEST
from flowspec_edge.web.refusals import NO_MODEL, refuse_as

SPOKEN = "0.12.6"
"""The version of Ollama whose API this is. Clients look whether it is new enough for them."""
FOREVER = "2318-01-01T00:00:00Z"
"""When a model is put out of memory that Ollama was told to keep."""
OWN = OwnFields(idle=frozenset({"verbose"}))


class ShowFields(msgspec.Struct, kw_only=True):
    """The body of ``POST /api/show``. ``name`` is what older clients call the model."""

    model: str | None = None
    name: str | None = None


class OllamaModels:
    def __init__(self, card: ModelCard, *, is_strict: bool) -> None:
        self._card = card
        self._is_strict = is_strict

    def add_to(self, router: web.UrlDispatcher) -> None:
        router.add_get("/api/version", self.tell_version)
        router.add_get("/api/tags", self.list_models)
        router.add_get("/api/ps", self.list_loaded)
        router.add_post("/api/show", self.show)

    async def tell_version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": SPOKEN, "flowspec": __version__})

    async def list_models(self, request: web.Request) -> web.Response:
        return web.json_response({"models": [self._listed()]})

    async def list_loaded(self, request: web.Request) -> web.Response:
        context = self._card.geometry.max_context
        loaded = {"expires_at": FOREVER, "size_vram": 0, "context_length": context}
        return web.json_response({"models": [self._listed() | loaded]})

    async def show(self, request: web.Request) -> web.Response:
        fields, _ = parse_fields(await read_body(request), ShowFields, is_strict=self._is_strict, own=OWN)
        card, asked = self._card, fields.model or fields.name
        if not asked:
            raise FieldError("model", "is missing", "missing_required_parameter")
        if asked.removesuffix(LATEST) != card.name:
            refuse_as(404, f"model {asked!r:.80} not found; this is {card.name}", NO_MODEL)
        return web.json_response(
            {
                "modelfile": "",
                "parameters": "",
                "template": card.chat_template or "{{ .Prompt }}",
                "details": self._details(),
                "model_info": self._facts(),
                "capabilities": ["completion", "tools", *(["thinking"] if card.thinks else [])],
                "modified_at": card.modified_at.isoformat(),
            }
        )

    def _listed(self) -> Json:
        card = self._card
        return {
            "name": card.name + LATEST,
            "model": card.name + LATEST,
            "modified_at": card.modified_at.isoformat(),
            "size": card.num_bytes,
            "digest": card.digest,
            "details": self._details(),
        }

    def _details(self) -> Json:
        card = self._card
        return {
            "parent_model": "",
            "format": "onnx",
            "family": card.architecture,
            "families": [card.architecture],
            "parameter_size": card.size_text,
            "quantization_level": card.precision,
        }

    def _facts(self) -> Json:
        """In the names of GGUF's metadata."""
        card, geometry, of = self._card, self._card.geometry, self._card.architecture
        return {
            "general.architecture": of,
            "general.basename": card.name,
            "general.parameter_count": card.num_parameters,
            f"{of}.block_count": geometry.num_layers,
            f"{of}.context_length": geometry.max_context,
            f"{of}.embedding_length": geometry.hidden_size,
            f"{of}.feed_forward_length": geometry.intermediate_size,
            f"{of}.attention.head_count": geometry.num_heads,
            f"{of}.attention.head_count_kv": geometry.num_kv_heads,
            f"{of}.vocab_size": geometry.vocab_size,
        }
