"""Run one large language model across the small boards on your LAN.

The public names, each imported from its module when it is first asked for: a program that uses the client needs neither
numpy nor ONNX Runtime, and one that reads the version needs nothing at all.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flowspec_edge.version import __version__

if TYPE_CHECKING:
    from flowspec_edge.client import Answer, Client, Health, Usage
    from flowspec_edge.config import GenerateOptions, Grammar, Piece, TextPart
    from flowspec_edge.core.answer_parts import TextLogprob, ToolCall
    from flowspec_edge.errors import (
        AnswerLostError,
        AnswerTimeoutError,
        ApiKeyError,
        FlowspecError,
        KeyTextError,
        LinkLostError,
        NodeUnavailableError,
        OtherBundleError,
        OtherKeyError,
        PlainHttpError,
        RequestError,
        ServerBusyError,
        StageFailedError,
    )
    from flowspec_edge.node.node import Node
    from flowspec_edge.origin.ring import Ring

__all__ = [
    "Answer",
    "AnswerLostError",
    "AnswerTimeoutError",
    "ApiKeyError",
    "Client",
    "FlowspecError",
    "GenerateOptions",
    "Grammar",
    "Health",
    "KeyTextError",
    "LinkLostError",
    "Node",
    "NodeUnavailableError",
    "OtherBundleError",
    "OtherKeyError",
    "Piece",
    "PlainHttpError",
    "RequestError",
    "Ring",
    "ServerBusyError",
    "StageFailedError",
    "TextLogprob",
    "TextPart",
    "ToolCall",
    "Usage",
    "__version__",
]

_HOMES = {
    "Answer": "client",
    "AnswerLostError": "errors",
    "AnswerTimeoutError": "errors",
    "ApiKeyError": "errors",
    "Client": "client",
    "FlowspecError": "errors",
    "GenerateOptions": "config",
    "Grammar": "config",
    "Health": "client",
    "KeyTextError": "errors",
    "LinkLostError": "errors",
    "Node": "node.node",
    "NodeUnavailableError": "errors",
    "OtherBundleError": "errors",
    "OtherKeyError": "errors",
    "Piece": "config",
    "PlainHttpError": "errors",
    "RequestError": "errors",
    "Ring": "origin.ring",
    "ServerBusyError": "errors",
    "StageFailedError": "errors",
    "TextLogprob": "core.answer_parts",
    "TextPart": "config",
    "ToolCall": "core.answer_parts",
    "Usage": "client",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
