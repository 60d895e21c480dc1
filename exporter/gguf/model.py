"""A model in a GGUF file: its layers as a checkpoint has them, its matrices as the file has them."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from exporter.blocks import Blocks
from exporter.config import LayerShape, geometry_of, read_layer_shape
from exporter.families import FAMILIES
from exporter.gguf.blocks import check_type, open_matrix, read_floats, read_matrix
from exporter.gguf.config import (
    LONGROPE_FACTORS,
    ROPE_FACTORS,
    architecture_of,
    gguf_name,
    huggingface_config,
    rows_in_checkpoint_order,
)
from exporter.gguf.file import GgufFile, GgufTensor
from exporter.gguf.tokenizer import GgufTokenizer, build_tokenizer
from exporter.known_fields import read_family
from exporter.layer_graph import Weights
from exporter.matrices import Matrix
from exporter.precisions import KEPT_SHARE
from exporter.source import Report
from exporter.tokenizer import check_vocabulary
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.errors import CheckpointError
from flowspec_edge.manifest import Geometry

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"
_AT_ONCE = 2**22
"""Values of the embedding that are unpacked at once: 16 MB."""
_BLOCK_BYTES = {
    **{"Q8_0": 1.125, "Q4_0": 0.625, "Q4_1": 0.75, "Q4_K": 0.75},
    **{"Q5_0": 1.125, "Q5_1": 1.25, "Q5_K": 1.25, "Q6_K": 1.25},
}
BYTES = {
    **{"F32": 4.0, "F16": 2.0, "BF16": 2.0},
    **{kind: num_bytes + 4 * KEPT_SHARE for kind, num_bytes in _BLOCK_BYTES.items()},
}
"""That a weight of each type takes in a graph; scales, offsets, and columns kept in float32 included."""
_WIDENED = ("Q5_0", "Q5_1", "Q5_K", "Q6_K")
"""Types whose levels of 5 and 6 bits are kept in 8, for which ONNX Runtime has kernels."""


@dataclass(frozen=True)
class GgufModel:
    """The model in ``file``. Tensors are read when asked for."""

    file: GgufFile
    architecture: str
    layer_shape: LayerShape
    num_layers: int
    vocab_size: int
    is_tied: bool
    rotates_pairs: bool
    tokenizer: GgufTokenizer

    libraries: ClassVar[tuple[str, ...]] = ("gguf",)

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def geometry(self) -> Geometry:
        return geometry_of(self.layer_shape, self.num_layers, self.vocab_size)

    @property
    def bos_token_id(self) -> int | None:
        return self.tokenizer.bos_token_id

    @property
    def eos_token_ids(self) -> list[int]:
        return self.tokenizer.eos_token_ids

    @property
    def chat_template(self) -> str | None:
        return self.tokenizer.chat_template

    @property
    def own_bytes(self) -> int:
        matrices = [tensor for tensor in self.file.tensors.values() if len(tensor.shape) == 2]
        embedding = self._tensor(EMBEDDING)
        kept = [tensor for tensor in matrices if tensor is not embedding or self.is_tied]
        return int(4 * math.prod(embedding.shape) + sum(math.prod(t.shape) * BYTES[t.type] for t in kept))

    def notes(self) -> Iterator[str]:
        matrices = [tensor for tensor in self.file.tensors.values() if len(tensor.shape) == 2]
        counts = Counter(tensor.type for tensor in matrices)
        yield f"matrices as the file has them: {', '.join(f'{kind} {n}' for kind, n in sorted(counts.items()))}"
        if widened := [kind for kind in _WIDENED if kind in counts]:
            yield f"levels of {', '.join(widened)} are kept in 8 bits, for there are no kernels for 5 and 6"
        yield from self.layer_shape.remarks
        yield from (f"note: {note}" for note in self.tokenizer.notes)

    def write_tokenizer(self, path: Path, report: Report) -> Tokenizer:
        path.write_text(self.tokenizer.tokenizer.to_str(), encoding="utf-8")
        tokenizer = Tokenizer(path)
        check_vocabulary(tokenizer, self.eos_token_ids, self.vocab_size, self.path)
        return tokenizer

    def embedding(self) -> Iterator[np.ndarray]:
        tensor = self._tensor(EMBEDDING)
        step = max(_AT_ONCE // self.layer_shape.hidden_size, 1)
        for start in range(0, self.vocab_size, step):
            found = read_matrix(tensor, start, min(start + step, self.vocab_size))
            yield found.unpacked() if isinstance(found, Blocks) else found

    def lm_head(self) -> Matrix:
        return open_matrix(self._tensor(EMBEDDING if self.is_tied else LM_HEAD))

    def final_norm(self) -> np.ndarray:
        return read_floats(self._tensor(FINAL_NORM))

    def layers(self, start: int, stop: int) -> Weights:
        weights: dict[str, Matrix | np.ndarray] = {}
        for layer in range(start, stop):
            for name, shape in self.layer_shape.tensor_shapes().items():
                stored, order = self._stored_part(name)
                tensor = self._tensor(f"model.layers.{layer}.{stored}")
                if len(shape) == 2:
                    weights[f"layers.{layer - start}.{name}"] = open_matrix(tensor, order)
                else:
                    floats = read_floats(tensor)
                    weights[f"layers.{layer - start}.{name}"] = floats if order is None else floats[order]
        return weights

    def _tensor(self, name: str) -> GgufTensor:
        return self.file.tensors[gguf_name(name, self.layer_shape.norms)]

    def _stored_part(self, name: str) -> tuple[str, np.ndarray | None]:
        """The tensor that one of a layer is stored in, and which row of it each row is; None: all of them, in order."""
        module, shape = name.rpartition(".")[0], self.layer_shape
        num_heads = {"self_attn.q_proj": shape.num_heads, "self_attn.k_proj": shape.num_kv_heads}.get(module)
        if not self.rotates_pairs or num_heads is None:
            return shape.stored_part(name)
        return name, rows_in_checkpoint_order(num_heads, shape.head_dim)


def open_gguf(path: Path, max_context: int | None = None) -> GgufModel:
    """Open a GGUF file, with all its parts, and check that all that an export needs is there.

    Args:
        max_context: lower the model's own limit.

    Raises:
        CheckpointError: the file is damaged or incomplete, or of an architecture, a type or a kind of tokenizer that is
            not supported.
    """
    file = GgufFile.open(path)
    architecture, config = read_family(path, huggingface_config(file))
    shape = read_layer_shape(path, config, FAMILIES[architecture], max_context)
    model = GgufModel(
        file=file,
        architecture=architecture,
        layer_shape=_with_rope_factors(file, shape),
        num_layers=int(config["num_hidden_layers"]),
        vocab_size=int(config["vocab_size"]),
        is_tied=bool(config["tie_word_embeddings"]),
        rotates_pairs=architecture_of(file).rotates_pairs,
        tokenizer=build_tokenizer(file.metadata, str(path)),
    )
    _check_tensors(model)
    return model


def _with_rope_factors(file: GgufFile, shape: LayerShape) -> LayerShape:
    """The shape with the rotary frequencies divided by those that the file has for each of them."""
    tensor = file.tensors.get(ROPE_FACTORS)
    if tensor is None:
        return shape
    expected = (shape.head_dim // 2,)
    if tensor.shape != expected:
        raise CheckpointError(
            f"{tensor.path}: tensor {tensor.name} has shape {list(tensor.shape)}, expected {list(expected)}"
        )
    factors = read_floats(tensor)
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise CheckpointError(f"{tensor.path}: tensor {tensor.name} has factors that are not positive")
    frequencies = np.array(shape.rope_frequencies, np.float32) / factors
    return dataclasses.replace(shape, rope_frequencies=tuple(frequencies.tolist()))


def _check_tensors(model: GgufModel) -> None:
    """Check, before the first graph is written, that every tensor needed is there, of its shape and of a type that is
    read, and that no other one is.
    """
    path, shape = model.path, model.layer_shape
    expected = {EMBEDDING: (model.vocab_size, shape.hidden_size), FINAL_NORM: (shape.hidden_size,)}
    if not model.is_tied:
        expected[LM_HEAD] = expected[EMBEDDING]
    for layer in range(model.num_layers):
        expected.update({f"model.layers.{layer}.{name}": size for name, size in shape.stored_shapes().items()})
    stored = {gguf_name(name, shape.norms): size for name, size in expected.items()}
    for name, size in stored.items():
        tensor = model.file.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{path}: tensor {name} is missing, expected shape {list(size)}")
        if tensor.shape != size:
            raise CheckpointError(
                f"{tensor.path}: tensor {name} has shape {list(tensor.shape)}, expected {list(size)} from its metadata"
            )
        check_type(tensor)
    for name in model.file.tensors:
        if name not in {*stored, ROPE_FACTORS, *LONGROPE_FACTORS.values()}:
            raise CheckpointError(f"{path}: tensor {name} has no place in the model that the file's metadata describe")
