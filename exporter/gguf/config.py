"""What a GGUF file says of its model, in the words of a Hugging Face ``config.json``.

So both kinds of checkpoint are read and refused by the same code. Names: ggml's docs/gguf.md, and the tensor names of
llama.cpp's ``convert_hf_to_gguf.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from exporter.gguf.file import GgufFile
from flowspec_edge.errors import CheckpointError

ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies, [head_dim / 2], where a model stretches its context as Llama 3.1 does."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model family under the name that GGUF files give it.

    ``rotates_pairs``: queries' and keys' rows are stored so that a rotation takes neighbours, and are put back in the
    order of the checkpoint, in which it takes the two halves of a head.
    """

    huggingface: str
    rotates_pairs: bool = False


ARCHITECTURES = {
    "llama": Architecture(huggingface="LlamaForCausalLM", rotates_pairs=True),
    "qwen2": Architecture(huggingface="Qwen2ForCausalLM"),
    "qwen3": Architecture(huggingface="Qwen3ForCausalLM"),
}
"""Mistral's files say llama, and have no sliding window."""

LAYER_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
MODEL_TENSORS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_FIELDS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "max_position_embeddings": "context_length",
}
_NEEDED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings")
_EXPERTS = ("expert_count", "expert_used_count")


def gguf_name(name: str) -> str:
    """The GGUF name of a tensor of a Hugging Face checkpoint: ``model.layers.3.mlp.up_proj.weight`` is
    ``blk.3.ffn_up.weight``.
    """
    if name in MODEL_TENSORS:
        return MODEL_TENSORS[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{LAYER_TENSORS[module]}.{kind}"


def architecture_of(file: GgufFile) -> Architecture:
    """Raises CheckpointError where the file's architecture is not among :data:`ARCHITECTURES`."""
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{file.path}: architecture {name!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def huggingface_config(file: GgufFile) -> dict[str, Any]:
    """The file's fields as a ``config.json`` has them. Values are checked where that is read.

    Raises:
        CheckpointError: the architecture is not supported, or a field is missing or asks for what no graph computes.
    """
    config: dict[str, Any] = {"architectures": [architecture_of(file).huggingface]}
    for name, key in _FIELDS.items():
        value = _one_for_all_layers(file, _value(file, key))
        if value is None and name in _NEEDED:
            raise CheckpointError(f"{file.path}: {_key(file, key)} is missing; convert the model again")
        if value is not None:
            config[name] = value
    for key in _EXPERTS:
        if _value(file, key):
            raise CheckpointError(f"{file.path}: {_key(file, key)} is {_value(file, key)}; experts are not supported")
    embedding = file.tensors.get(MODEL_TENSORS["model.embed_tokens.weight"])
    if embedding is None:
        raise CheckpointError(f"{file.path}: tensor token_embd.weight is missing; is this file a vocabulary alone?")
    config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = MODEL_TENSORS["lm_head.weight"] not in file.tensors
    config["attention_bias"] = "blk.0.attn_output.bias" in file.tensors
    config["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    config["rope_scaling"] = _rope_scaling(file)
    config["partial_rotary_factor"] = _rotated_share(file, config)
    return config


def _rotated_share(file: GgufFile, config: dict[str, Any]) -> float:
    """Which part of a head is rotated. Fields that are no sizes are left to who checks them."""
    rotated, head_dim = _value(file, "rope.dimension_count"), config.get("head_dim")
    hidden_size, num_heads = config["hidden_size"], config["num_attention_heads"]
    if head_dim is None and isinstance(hidden_size, int) and isinstance(num_heads, int) and num_heads:
        head_dim = hidden_size // num_heads
    return rotated / head_dim if isinstance(rotated, int) and isinstance(head_dim, int) and head_dim else 1.0


def rows_in_checkpoint_order(num_heads: int, head_dim: int) -> np.ndarray:
    """Which stored row of queries or keys each row of the checkpoint is, where a file's rotation takes neighbours."""
    stored = np.arange(num_heads * head_dim).reshape(num_heads, head_dim // 2, 2)
    return stored.swapaxes(1, 2).reshape(-1)


def _rope_scaling(file: GgufFile) -> Mapping[str, Any] | None:
    kind = _value(file, "rope.scaling.type")
    factor = _value(file, "rope.scaling.factor")
    if factor is None:  # as files had it before there were types
        factor = _value(file, "rope.scale_linear")
        kind = kind or ("linear" if factor not in (None, 1.0) else None)
    if kind in (None, "none"):
        return None
    original = _value(file, "rope.scaling.original_context_length")
    return {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}


def _one_for_all_layers(file: GgufFile, value: Any) -> Any:
    """A field's value; where it is a list with one for each layer, these must be the same."""
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise CheckpointError(f"{file.path}: layers of different sizes ({value[:4]} ...) are not supported")
    return value[0]


def _key(file: GgufFile, key: str) -> str:
    return f"{file.metadata['general.architecture']}.{key}"


def _value(file: GgufFile, key: str) -> Any:
    return file.metadata.get(_key(file, key))
