"""Reads a Hugging Face checkpoint: config, tokenizer files and plain tensors, each with its shape checked."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from exporter.blocks import Blocks
from exporter.config import LayerShape, geometry_of, read_layer_shape
from exporter.families import FAMILIES
from exporter.fields import positive_int, read_json
from exporter.known_fields import TEXT_PREFIX, read_family
from exporter.layer_graph import Weights
from exporter.matrices import FloatMatrix, Matrix
from exporter.quantised import Quantisation, read_quantisation
from exporter.source import Report
from exporter.tensors import TensorFiles
from exporter.tokenizer import CONFIG, check_vocabulary, contradictions, find_tokenizer, write_tokenizer
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.errors import CheckpointError
from flowspec_edge.manifest import Geometry

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"


@dataclass(frozen=True)
class Checkpoint:
    """A target model on disk. Tensors are read when asked for, so that one block is in memory at a time.

    ``quantisation`` is how its matrices are rounded, those that are not stored as floats; None: none of them are.
    """

    directory: Path
    architecture: str
    layer_shape: LayerShape
    num_layers: int
    vocab_size: int
    is_tied: bool
    bos_token_id: int | None
    eos_token_ids: list[int]
    chat_template: str | None
    tokenizer_path: Path
    tensors: TensorFiles
    quantisation: Quantisation | None = None

    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "safetensors")

    @property
    def path(self) -> Path:
        return self.directory

    @property
    def geometry(self) -> Geometry:
        return geometry_of(self.layer_shape, self.num_layers, self.vocab_size)

    @property
    def own_bytes(self) -> int:
        if self.quantisation is None:
            return 0
        tables = 2 * 4 * self.vocab_size * self.layer_shape.hidden_size
        in_layer = sum(math.prod(size) for size in self.layer_shape.stored_shapes().values() if len(size) == 2)
        return tables + int(self.num_layers * in_layer * self.quantisation.bytes_per_weight)

    def notes(self) -> Iterator[str]:
        if self.quantisation is not None:
            yield f"matrices as the checkpoint has them: {self.quantisation}"
        yield from self.layer_shape.remarks

    def write_tokenizer(self, path: Path, report: Report) -> Tokenizer:
        tokenizer = write_tokenizer(self.tokenizer_path, path)
        bos, eos = self.bos_token_id, self.eos_token_ids
        special = eos if bos is None else [bos, *eos]
        check_vocabulary(tokenizer, special, self.vocab_size, self.tokenizer_path)
        config = self.directory / CONFIG
        for contradiction in contradictions(tokenizer, read_json(config) if config.is_file() else {}, bos, eos):
            report(f"note: {contradiction}")
        return tokenizer

    def embedding(self) -> Iterator[np.ndarray]:
        yield self._embedding()

    def lm_head(self) -> Matrix:
        if self.is_tied:
            return FloatMatrix(self._embedding())
        return self._matrix(LM_HEAD, (self.vocab_size, self.layer_shape.hidden_size))

    def final_norm(self) -> np.ndarray:
        return self.tensors.read(FINAL_NORM, (self.layer_shape.hidden_size,)) + np.float32(self.layer_shape.norm_offset)

    def layers(self, start: int, stop: int) -> Weights:
        weights: dict[str, Matrix | np.ndarray] = {}
        shapes = self.layer_shape.stored_shapes()
        for layer in range(start, stop):
            for name in self.layer_shape.tensor_shapes():
                stored, rows = self.layer_shape.stored_part(name)
                full, size, own = f"model.layers.{layer}.{stored}", shapes[stored], f"layers.{layer - start}.{name}"
                if len(size) == 2:
                    matrix = self._matrix(full, size)
                    weights[own] = matrix if rows is None else matrix.take(rows)
                    continue
                found = self.tensors.read(full, size)
                if rows is not None:
                    found = found[rows]
                weights[own] = found + np.float32(self.layer_shape.norm_offset) if "norm" in name else found
        return weights

    def _matrix(self, name: str, shape: tuple[int, ...]) -> FloatMatrix | Blocks:
        if self.quantisation is not None and name not in self.tensors:
            return self.quantisation.read(self.tensors, name.removesuffix(".weight"), shape)
        return FloatMatrix(self.tensors.read(name, shape))

    def _embedding(self) -> np.ndarray:
        return self.tensors.read(EMBEDDING, (self.vocab_size, self.layer_shape.hidden_size))


def load_checkpoint(directory: Path, max_context: int | None = None, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a checkpoint and check that all it needs is there.

    Args:
        max_context: lower the model's own limit.
        allow_pickle: read ``pytorch_model.bin`` where there are no safetensors.

    Raises:
        CheckpointError: a file or field is missing, or the architecture is not known.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such checkpoint directory")
    path = directory / "config.json"
    given = read_json(path)
    architecture, config = read_family(path, given)
    shape = read_layer_shape(path, config, FAMILIES[architecture], max_context)
    tensors = TensorFiles(directory, TEXT_PREFIX if "text_config" in given else "", allow_pickle=allow_pickle)
    quantisation = read_quantisation(path, config)
    is_tied = bool(config.get("tie_word_embeddings", False))
    if not is_tied and LM_HEAD not in tensors and quantisation is None:
        raise CheckpointError(
            f"{directory}: tensor {LM_HEAD} is missing and config.json does not set tie_word_embeddings"
        )
    num_layers, vocab_size = (positive_int(path, config, field) for field in ("num_hidden_layers", "vocab_size"))
    _check_tensors(tensors, shape, num_layers, vocab_size, is_tied, quantisation)
    bos_token_id, eos_token_ids = _read_special_tokens(directory, config)
    return Checkpoint(
        directory=directory,
        architecture=architecture,
        layer_shape=shape,
        num_layers=num_layers,
        vocab_size=vocab_size,
        is_tied=is_tied,
        bos_token_id=bos_token_id,
        eos_token_ids=eos_token_ids,
        chat_template=_read_chat_template(directory),
        tokenizer_path=find_tokenizer(directory),
        tensors=tensors,
        quantisation=quantisation,
    )


def _check_tensors(
    tensors: TensorFiles,
    shape: LayerShape,
    num_layers: int,
    vocab_size: int,
    is_tied: bool,
    quantisation: Quantisation | None,
) -> None:
    """Check, before the first graph is written, that every tensor needed is there and that no other one is.

    A tensor that no graph would use means that the config belongs to another model.
    """
    expected = {EMBEDDING: (vocab_size, shape.hidden_size), FINAL_NORM: (shape.hidden_size,)}
    if not is_tied:
        expected[LM_HEAD] = expected[EMBEDDING]
    for layer in range(num_layers):
        expected.update({f"model.layers.{layer}.{name}": size for name, size in shape.stored_shapes().items()})
    rounded: set[str] = set()
    for name, size in expected.items():
        if quantisation is not None and len(size) == 2 and name != EMBEDDING and name not in tensors:
            rounded.update(quantisation.check(tensors, name.removesuffix(".weight"), size))
        else:
            tensors.check(name, size)
    known = {*expected, *rounded, LM_HEAD}  # some files store the head although it is tied
    for name in tensors.names():
        is_harmless = name.endswith("rotary_emb.inv_freq") or (rounded and _is_zero_bias(tensors, name))
        if name not in known and not is_harmless:
            raise CheckpointError(
                f"{tensors.directory}: tensor {name} has no place in the model that config.json describes; are config "
                "and weights of the same model?"
            )


def _is_zero_bias(tensors: TensorFiles, name: str) -> bool:
    """Whether a tensor is a bias of zeros, which the first versions of AutoGPTQ stored with every matrix."""
    return name.endswith(".bias") and not tensors.read(name, tensors.shape(name)).any()


def _read_special_tokens(directory: Path, config: Mapping[str, Any]) -> tuple[int | None, list[int]]:
    """``generation_config.json`` overrides ``config.json``, as in transformers."""
    generation_path = directory / "generation_config.json"
    merged = {key: config.get(key) for key in ("bos_token_id", "eos_token_id")}
    if generation_path.is_file():
        generation = read_json(generation_path)
        merged.update({key: generation[key] for key in merged if generation.get(key) is not None})
    eos = merged["eos_token_id"]
    eos_token_ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    return merged["bos_token_id"], eos_token_ids


def _read_chat_template(directory: Path) -> str | None:
    template_path = directory / "chat_template.jinja"
    if template_path.is_file():
        return template_path.read_text(encoding="utf-8")
    tokenizer_config = directory / "tokenizer_config.json"
    template = read_json(tokenizer_config).get("chat_template") if tokenizer_config.is_file() else None
    if isinstance(template, list):  # several named templates: the one called default
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    return template
