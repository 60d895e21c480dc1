"""The API as an OpenAPI document, made of the types that bodies are parsed by."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Annotated, Any, NamedTuple

import msgspec
from aiohttp import web

from flowspec_edge.version import __version__
from flowspec_edge.web.chat import ChatFields
from flowspec_edge.web.completions import PROMPT_RULE, CompletionFields
from flowspec_edge.web.framing import DATA_EVENTS, LINES, NAMED_EVENTS, Framing, Json
from flowspec_edge.web.messages import MessagesFields
from flowspec_edge.web.ollama import OllamaChatFields, OllamaGenerateFields
from flowspec_edge.web.ollama_models import ShowFields
from flowspec_edge.web.responses import ResponseFields
from flowspec_edge.web.tokens import DetokenizeFields, TokenizeFields

PATH = "/openapi.json"
JSON = "application/json"
REFERENCE = "#/components/schemas/{name}"


class Operation(NamedTuple):
    """Without a ``body`` it is a GET. ``streams`` is how its answer is sent where that is a stream."""

    path: str
    summary: str
    body: type[msgspec.Struct] | None = None
    streams: Framing | None = None


OPERATIONS = (
    Operation("/v1/chat/completions", "the next message of a dialogue, as OpenAI has it", ChatFields, DATA_EVENTS),
    Operation("/v1/completions", "a text that goes on with a prompt, as OpenAI has it", CompletionFields, DATA_EVENTS),
    Operation("/v1/responses", "the next message of a dialogue, as a list of items", ResponseFields, NAMED_EVENTS),
    Operation("/v1/messages", "the next message of a dialogue, as Anthropic has it", MessagesFields, NAMED_EVENTS),
    Operation("/v1/messages/count_tokens", "how many tokens a dialogue has", MessagesFields),
    Operation("/api/chat", "the next message of a dialogue, as Ollama has it", OllamaChatFields, LINES),
    Operation("/api/generate", "the answer to a prompt, as Ollama has it", OllamaGenerateFields, LINES),
    Operation("/api/show", "what is known of the model", ShowFields),
    Operation("/tokenize", "the tokens of a prompt or a dialogue, as vLLM has it", TokenizeFields),
    Operation("/detokenize", "the text of tokens, as vLLM has it", DetokenizeFields),
    Operation("/v1/models", "the model that is served"),
    Operation("/v1/models/{id}", "the model that is served"),
    Operation("/api/tags", "the model that is served, as Ollama has it"),
    Operation("/api/ps", "the model that is served, as Ollama has it"),
    Operation("/api/version", "the version of Ollama whose API this is"),
    Operation("/health", "that the server is there"),
)
TOKEN_IDS: Json = {"type": "array", "items": {"type": "integer"}}
RAW: Mapping[str, Json] = {
    "prompt": {
        "description": PROMPT_RULE,
        "anyOf": [
            {"type": "string"},
            {"type": "array", "items": {"type": "string"}},
            TOKEN_IDS,
            {"type": "array", "items": TOKEN_IDS},
            {"type": "null"},
        ],
    },
}
"""What may stand in fields that are parsed later."""


def add_to(router: web.UrlDispatcher, *, needs_key: bool) -> None:
    """Serve the document of all that the router has by now."""
    paths = {resource.canonical for resource in router.resources()}

    @functools.cache
    def made() -> Json:
        return document(paths, needs_key=needs_key)

    async def answer(request: web.Request) -> web.Response:
        return web.json_response(made())

    router.add_get(PATH, answer)


def document(paths: Collection[str], *, needs_key: bool) -> Json:
    """The document of what is served under these paths."""
    served = [operation for operation in OPERATIONS if operation.path in paths]
    bodies = {operation.body: _told(operation.body) for operation in served if operation.body is not None}
    references, components = msgspec.json.schema_components(bodies.values(), ref_template=REFERENCE)
    schemas = dict(zip(bodies, references, strict=True))
    found: Json = {
        "openapi": "3.1.0",
        "info": {"title": "flowspec-edge", "version": __version__},
        "paths": {operation.path: _path_item(operation, schemas) for operation in served},
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            },
        },
    }
    return found | {"security": [{"bearer": []}, {"header": []}]} if needs_key else found


def _path_item(operation: Operation, schemas: Mapping[type[msgspec.Struct], Json]) -> Json:
    kinds: Json = {JSON: {}} | ({operation.streams.content_type: {}} if operation.streams else {})
    told: Json = {
        "summary": operation.summary,
        "responses": {
            "200": {"description": "the answer", "content": kinds},
            "default": {"description": "why not, in the form of the dialect", "content": {JSON: {}}},
        },
    }
    if operation.body is not None:
        told["requestBody"] = {"required": True, "content": {JSON: {"schema": schemas[operation.body]}}}
        return {"post": told}
    if operation.path.endswith("{id}"):
        told["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]
    return {"get": told}


def _told(kind: type[msgspec.Struct]) -> type[msgspec.Struct]:
    """A type of the same name and fields of which msgspec can make a schema: of raw JSON as a default it makes none."""
    fields: list[Any] = []
    for field in msgspec.structs.fields(kind):
        if field.type is msgspec.Raw:
            fields.append((field.name, Annotated[Any, msgspec.Meta(extra_json_schema=RAW[field.name])], None))
        elif field.required:
            fields.append((field.name, field.type))
        else:
            fields.append((field.name, field.type, field.default))
    return msgspec.defstruct(kind.__name__, fields, namespace={"__doc__": kind.__doc__}, kw_only=True)
