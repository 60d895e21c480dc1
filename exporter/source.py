"""What a bundle is made from, whatever kind of file it is in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Protocol

import numpy as np

from exporter.config import LayerShape
from exporter.layer_graph import Weights
from exporter.matrices import Matrix
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.manifest import Geometry

Report = Callable[[str], None]
LIBRARIES = ("flowspec-edge", "onnx", "onnxruntime")
"""What every export is made with."""


class Source(Protocol):
    """A model on disk. Weights are read when asked for, so that one block is in memory at a time."""

    @property
    def path(self) -> Path: ...

    @property
    def architecture(self) -> str: ...

    @property
    def layer_shape(self) -> LayerShape: ...

    @property
    def geometry(self) -> Geometry: ...

    @property
    def is_tied(self) -> bool:
        """Whether the output matrix is the embedding."""
        ...

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_ids(self) -> list[int]: ...

    @property
    def chat_template(self) -> str | None: ...

    @property
    def libraries(self) -> tuple[str, ...]:
        """The libraries that read it, whose versions a bundle tells."""
        ...

    @property
    def own_bytes(self) -> int:
        """About how many bytes a bundle in its own precision takes; 0 where it has none, since it is not quantised."""
        ...

    def notes(self) -> Iterator[str]:
        """What an export should tell of it."""
        ...

    def write_tokenizer(self, path: Path, report: Report) -> Tokenizer:
        """Write ``tokenizer.json``, and report what contradicts itself in the model's files."""
        ...

    def embedding(self) -> Iterator[np.ndarray]:
        """The table [vocab_size, hidden_size] in pieces of some rows, in float32 or float16."""
        ...

    def layers(self, start: int, stop: int) -> Weights:
        """The weights of the layers ``[start, stop)``, of which the first is named ``layers.0``."""
        ...

    def final_norm(self) -> np.ndarray: ...

    def lm_head(self) -> Matrix:
        """The output matrix, [vocab_size, hidden_size]; the embedding where the two are tied."""
        ...


def versions_of(libraries: Iterable[str]) -> dict[str, str]:
    """The versions of LIBRARIES and of further ones."""
    versions: dict[str, str] = {}
    for name in (*LIBRARIES, *libraries):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a source tree
            continue
    return versions
