"""Reads a Hugging Face Llama checkpoint: config, tokenizer files and plain tensors, each with its shape checked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from flowspec_edge.errors import CheckpointError
from flowspec_edge.manifest import Geometry

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM",)
EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"
HEAD_DIM_MULTIPLE = 16
"""GroupQueryAttention refuses other head sizes (onnxruntime 1.32, CPU)."""

# transformers' own defaults for a LlamaConfig that leaves a field out.
_DEFAULT_RMS_NORM_EPS = 1e-6
_DEFAULT_ROPE_THETA = 10000.0
_DEFAULT_MAX_CONTEXT = 2048


class TensorFiles:
    """The tensors of one directory: ``model.safetensors``, its sharded index, or a ``pytorch_model.bin``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._bin: dict[str, torch.Tensor] = {}
        self._file_of = self._locate()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def names(self) -> list[str]:
        return sorted(self._file_of)

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """One tensor in its stored type.

        Raises:
            CheckpointError: the tensor is missing, unreadable or of another shape.
        """
        path = self._file_of.get(name)
        if path is None:
            raise CheckpointError(f"{self.directory}: tensor {name} is missing, expected shape {list(shape)}")
        if name in self._bin:
            found = self._bin[name]
        else:
            with _open_safetensors(path) as file:
                found = file.get_tensor(name)
        if tuple(found.shape) != shape:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {list(found.shape)}, expected {list(shape)} from config.json"
            )
        if not found.is_floating_point():
            raise CheckpointError(
                f"{path}: tensor {name} is of type {found.dtype}; only float16, bfloat16 and float32 weights are read"
            )
        return found

    def _locate(self) -> dict[str, Path]:
        index = self.directory / "model.safetensors.index.json"
        single = self.directory / "model.safetensors"
        pickled = self.directory / "pytorch_model.bin"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{index}: has no weight_map; download the checkpoint again")
            return self._locate_shards(index, weight_map)
        if single.is_file():
            with _open_safetensors(single) as file:
                return {name: single for name in file.keys()}  # noqa: SIM118 (a safetensors handle has no __iter__)
        if pickled.is_file():
            try:
                self._bin = torch.load(pickled, map_location="cpu", weights_only=True)
            except Exception as cause:  # torch.load raises half a dozen unrelated types for a damaged file
                raise CheckpointError(f"{pickled}: not readable as weights ({cause}); download it again") from cause
            return {name: pickled for name in self._bin}
        raise CheckpointError(
            f"{self.directory}: no model.safetensors, model.safetensors.index.json or pytorch_model.bin"
        )

    def _locate_shards(self, index: Path, weight_map: dict[str, str]) -> dict[str, Path]:
        located = {}
        for shard in sorted(set(weight_map.values())):
            path = self.directory / shard
            if path.parent != self.directory or not path.is_file():
                raise CheckpointError(f"{index}: names {shard}, which is missing; download the checkpoint again")
            with _open_safetensors(path) as file:
                present = set(file.keys())
            for name, owner in weight_map.items():
                if owner == shard and name in present:
                    located[name] = path
        return located


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Everything that shapes one decoder layer and its rotary tables."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_context: int

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one layer's tensors by their name below ``layers.N.``."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (q_size, hidden),
            "self_attn.k_proj.weight": (kv_size, hidden),
            "self_attn.v_proj.weight": (kv_size, hidden),
            "self_attn.o_proj.weight": (hidden, q_size),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }


@dataclass(frozen=True)
class Checkpoint:
    """A target model on disk. Tensors are read when asked for, so that one block is in memory at a time."""

    directory: Path
    architecture: str
    geometry: Geometry
    bos_token_id: int | None
    eos_token_ids: list[int]
    chat_template: str | None
    tokenizer_path: Path
    tensors: TensorFiles

    @property
    def layer_shape(self) -> LayerShape:
        g = self.geometry
        return LayerShape(
            hidden_size=g.hidden_size,
            intermediate_size=g.intermediate_size,
            num_heads=g.num_heads,
            num_kv_heads=g.num_kv_heads,
            head_dim=g.head_dim,
            rms_norm_eps=g.rms_norm_eps,
            rope_theta=g.rope_theta,
            max_context=g.max_context,
        )

    def embedding(self) -> torch.Tensor:
        """The embedding table in its stored type: [vocab_size, hidden_size]."""
        return self.tensors.read(EMBEDDING, (self.geometry.vocab_size, self.geometry.hidden_size))

    def lm_head(self) -> torch.Tensor:
        """The output projection as float32 [vocab_size, hidden_size]; the embedding where the two are tied."""
        name = LM_HEAD if LM_HEAD in self.tensors else EMBEDDING
        return self.tensors.read(name, (self.geometry.vocab_size, self.geometry.hidden_size)).float()

    def final_norm(self) -> torch.Tensor:
        return self.tensors.read(FINAL_NORM, (self.geometry.hidden_size,)).float()

    def layers(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        """Float32 weights of the layers ``[start, stop)``, named ``layers.{i - start}.…``."""
        shapes = self.layer_shape.tensor_shapes()
        return {
            f"layers.{layer - start}.{name}": self.tensors.read(f"model.layers.{layer}.{name}", shape).float()
            for layer in range(start, stop)
            for name, shape in shapes.items()
        }


def load_checkpoint(directory: Path, max_context: int | None = None) -> Checkpoint:
    """Open a checkpoint and check that all it needs is there.

    Args:
        max_context: lower the model's own limit; it sizes the rotary tables kept in every block.

    Raises:
        CheckpointError: a file or field is missing, or the architecture is not known.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such checkpoint directory")
    path = directory / "config.json"
    config = read_json(path)
    architecture = _check_architecture(path, config)
    geometry = _read_geometry(path, config, max_context)
    tensors = TensorFiles(directory)
    if LM_HEAD not in tensors and not config.get("tie_word_embeddings", False):
        raise CheckpointError(
            f"{directory}: tensor {LM_HEAD} is missing and config.json does not set tie_word_embeddings"
        )
    tokenizer_path = directory / "tokenizer.json"
    if not tokenizer_path.is_file():
        raise CheckpointError(
            f"{directory}: tokenizer.json is missing; save the tokenizer once with transformers' AutoTokenizer "
            "(use_fast=True) to make it"
        )
    bos_token_id, eos_token_ids = _read_special_tokens(directory, config)
    return Checkpoint(
        directory=directory,
        architecture=architecture,
        geometry=geometry,
        bos_token_id=bos_token_id,
        eos_token_ids=eos_token_ids,
        chat_template=_read_chat_template(directory),
        tokenizer_path=tokenizer_path,
        tensors=tensors,
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; :class:`CheckpointError` where there is none."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: {path.name} is missing")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise CheckpointError(f"{path}: not readable as JSON ({cause})") from cause
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def read_layer_shape(path: Path, config: dict[str, Any], max_context: int | None = None) -> LayerShape:
    """The layer fields of a Llama-like ``config.json``, refusing by name what the graphs do not compute."""
    _refuse_unsupported(path, config)
    hidden_size = _positive_int(path, config, "hidden_size")
    num_heads = _positive_int(path, config, "num_attention_heads")
    num_kv_heads = _positive_int(path, config, "num_key_value_heads", num_heads)
    head_dim = _positive_int(path, config, "head_dim", hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"{path}: num_attention_heads {num_heads} is not a multiple of {num_kv_heads} key-value heads"
        )
    if head_dim % HEAD_DIM_MULTIPLE:
        raise CheckpointError(
            f"{path}: head_dim {head_dim} is not a multiple of {HEAD_DIM_MULTIPLE}; the attention operator of ONNX Runtime "
            "takes no other, so this model cannot be exported"
        )
    own_context = _positive_int(path, config, "max_position_embeddings", _DEFAULT_MAX_CONTEXT)
    if max_context is not None and not 1 <= max_context <= own_context:
        raise CheckpointError(
            f"{path}: --max-context {max_context} is outside 1 to {own_context}, the model's own limit"
        )
    return LayerShape(
        hidden_size=hidden_size,
        intermediate_size=_positive_int(path, config, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_positive_float(path, config, "rms_norm_eps", _DEFAULT_RMS_NORM_EPS),
        rope_theta=_positive_float(path, config, "rope_theta", _DEFAULT_ROPE_THETA),
        max_context=max_context or own_context,
    )


def _check_architecture(path: Path, config: dict[str, Any]) -> str:
    architectures = config.get("architectures") or []
    if len(architectures) != 1 or architectures[0] not in SUPPORTED_ARCHITECTURES:
        found = ", ".join(map(str, architectures)) or "none"
        raise CheckpointError(
            f"{path}: architecture {found} is not supported; supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    return str(architectures[0])


def _read_geometry(path: Path, config: dict[str, Any], max_context: int | None) -> Geometry:
    shape = read_layer_shape(path, config, max_context)
    return Geometry(
        num_layers=_positive_int(path, config, "num_hidden_layers"),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=_positive_int(path, config, "vocab_size"),
        max_context=shape.max_context,
        rms_norm_eps=shape.rms_norm_eps,
        rope_theta=shape.rope_theta,
    )


def _refuse_unsupported(path: Path, config: dict[str, Any]) -> None:
    scaling = config.get("rope_scaling")
    if scaling:
        kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, dict) else scaling
        raise CheckpointError(f"{path}: rope_scaling {kind!r} is not supported yet; only plain rotary embedding is")
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{path}: hidden_act {config['hidden_act']!r} is not supported; supported: silu")
    for field in ("attention_bias", "mlp_bias"):
        if config.get(field):
            raise CheckpointError(f"{path}: {field} true is not supported yet; only projections without bias are")
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{path}: the checkpoint is already quantised (quantization_config); export the original weights "
            "with --precision int8 instead"
        )


def _read_special_tokens(directory: Path, config: dict[str, Any]) -> tuple[int | None, list[int]]:
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


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as cause:
        raise CheckpointError(
            f"{path}: {path.stat().st_size} bytes, not readable as safetensors ({cause}); download it again"
        ) from cause


def _positive_int(path: Path, config: dict[str, Any], field: str, default: int | None = None) -> int:
    value = default if config.get(field) is None else config[field]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{path}: {field} is {value!r}, expected a positive integer")
    return value


def _positive_float(path: Path, config: dict[str, Any], field: str, default: float) -> float:
    value = default if config.get(field) is None else config[field]
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise CheckpointError(f"{path}: {field} is {value!r}, expected a positive number")
    return float(value)
