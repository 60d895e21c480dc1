"""Run one large language model across the small boards on your LAN."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowspec_edge.client import Client

__all__ = ["Client", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # The client brings aiohttp along; a device that only reads a manifest should not wait for it.
    if name == "Client":
        from flowspec_edge.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
