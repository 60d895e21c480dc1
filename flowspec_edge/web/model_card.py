"""What the API tells of the model that it serves."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self

from flowspec_edge.bundle import Bundle
from flowspec_edge.manifest import MANIFEST_NAME, Geometry

_UNITS = ((1e9, "B"), (1e6, "M"), (1e3, "K"))


@dataclass(frozen=True, slots=True)
class ModelCard:
    """``num_bytes`` are those of all its files, and ``num_parameters`` counts an embedding that is the head once."""

    name: str
    digest: str
    architecture: str
    precision: str
    geometry: Geometry
    chat_template: str | None
    num_bytes: int
    modified_at: datetime

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> Self:
        manifest = bundle.manifest
        written_at = (bundle.directory / MANIFEST_NAME).stat().st_mtime
        return cls(
            name=manifest.name,
            digest=bundle.digest,
            architecture=manifest.architecture,
            precision=manifest.precision,
            geometry=manifest.geometry,
            chat_template=manifest.chat_template,
            num_bytes=sum(entry.num_bytes for entry in manifest.files()),
            modified_at=datetime.fromtimestamp(written_at, UTC),
        )

    @property
    def num_parameters(self) -> int:
        """Of embedding and layers: what the geometry tells."""
        geometry = self.geometry
        queries, keys = (num * geometry.head_dim for num in (geometry.num_heads, geometry.num_kv_heads))
        layer = geometry.hidden_size * (2 * queries + 2 * keys + 3 * geometry.intermediate_size + 2)
        return geometry.hidden_size * (geometry.vocab_size + 1) + geometry.num_layers * layer

    @property
    def size_text(self) -> str:
        """The number of parameters as people write it, 6.4M for example."""
        num = self.num_parameters
        unit, letter = next(((unit, letter) for unit, letter in _UNITS if num >= unit), (1, ""))
        return f"{num / unit:.1f}{letter}"

    @property
    def thinks(self) -> bool:
        """Whether its template knows of reasoning."""
        return self.chat_template is not None and "think" in self.chat_template
