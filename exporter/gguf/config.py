"""What a GGUF file says of its model, in the words of a Hugging Face ``config.json``.

So both kinds of checkpoint are read and refused by the same code. Names: ggml's docs/gguf.md, and the tensor names of
llama.cpp's ``convert_hf_to_gguf.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from exporter.families import BEFORE, Norms
from exporter.gguf.blocks import read_floats
from exporter.gguf.file import GgufFile
from exporter.rope import FULL, SLIDING
from flowspec_edge.errors import CheckpointError

ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies, [head_dim / 2], where a model stretches its context as Llama 3.1 does."""
LONGROPE_FACTORS = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}
"""Those of Phi-3, [rotated values of a head / 2], by the field of a checkpoint's config."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model family under the name that GGUF files give it.

    ``rotates_pairs``: queries' and keys' rows are stored so that a rotation takes neighbours, and are put back in the
    order of the checkpoint, in which it takes the two halves of a head. ``fields`` are those that it has beside the
    ones of all. A model of ``num_wide_layers`` scales scores by the share of a head in a row, as files do not say.
    """

    huggingface: str
    rotates_pairs: bool = False
    fields: Mapping[str, str] = field(default_factory=dict)
    num_wide_layers: int | None = None


_GEMMA = {
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GRANITE = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
ARCHITECTURES = {
    "llama": Architecture(huggingface="LlamaForCausalLM", rotates_pairs=True),
    "qwen2": Architecture(huggingface="Qwen2ForCausalLM"),
    "qwen3": Architecture(huggingface="Qwen3ForCausalLM"),
    "gemma2": Architecture(huggingface="Gemma2ForCausalLM", fields=_GEMMA, num_wide_layers=46),
    "gemma3": Architecture(
        huggingface="Gemma3ForCausalLM",
        fields={**_GEMMA, "rope_local_base_freq": "rope.freq_base_swa"},
        num_wide_layers=62,
    ),
    "phi3": Architecture(huggingface="Phi3ForCausalLM", fields={"sliding_window": "attention.sliding_window"}),
    "granite": Architecture(huggingface="GraniteForCausalLM", rotates_pairs=True, fields=_GRANITE),
    "olmo2": Architecture(huggingface="Olmo2ForCausalLM"),
    "smollm3": Architecture(huggingface="SmolLM3ForCausalLM", rotates_pairs=True),
}
"""Mistral's files say llama, and have no sliding window; Phi-4's say phi3."""

LAYER_TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
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
_READ = {
    *("rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"),
    *("rope.scaling.original_context_length", "rope.scaling.attn_factor", "rope.scaling.yarn_beta_fast"),
    *("rope.scaling.yarn_beta_slow", "attention.value_length", "attention.sliding_window_pattern"),
}
_HARMLESS = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned"}
"""Fields that change nothing of what is computed."""


def gguf_name(name: str, norms: Norms = BEFORE) -> str:
    """The GGUF name of a tensor of a Hugging Face checkpoint: ``model.layers.3.mlp.up_proj.weight`` is
    ``blk.3.ffn_up.weight``. Files name norms by their places.
    """
    if name in MODEL_TENSORS:
        return MODEL_TENSORS[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    module, _, kind = rest.rpartition(".")
    places = {
        norms.before_attention: "attn_norm",
        norms.after_attention: "post_attention_norm",
        norms.before_mlp: "ffn_norm",
        norms.after_mlp: "post_ffw_norm",
    }
    return f"blk.{layer}.{LAYER_TENSORS.get(module) or places[module]}.{kind}"


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
    architecture = architecture_of(file)
    config: dict[str, Any] = {"architectures": [architecture.huggingface]}
    for name, key in {**_FIELDS, **architecture.fields}.items():
        value = _one_for_all_layers(file, _value(file, key))
        if value is None and name in _NEEDED:
            raise CheckpointError(f"{file.path}: {_key(file, key)} is missing; convert the model again")
        if value is not None:
            config[name] = value
    _refuse_unknown(file, architecture)
    embedding = file.tensors.get(MODEL_TENSORS["model.embed_tokens.weight"])
    if embedding is None:
        raise CheckpointError(f"{file.path}: tensor token_embd.weight is missing; is this file a vocabulary alone?")
    config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = MODEL_TENSORS["lm_head.weight"] not in file.tensors
    config["attention_bias"] = "blk.0.attn_output.bias" in file.tensors
    config["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    config["partial_rotary_factor"] = _rotated_share(file, config)
    config["rope_scaling"] = _longrope(file) or _rope_scaling(file)
    if config.get("sliding_window") == 0:  # as files of Phi-4 say that there is none
        config["sliding_window"] = None
    if architecture.num_wide_layers is not None:
        heads = "num_attention_heads", "hidden_size", "head_dim"
        num_heads, hidden_size, head_dim = (config.get(name) for name in heads)
        is_wide = config["num_hidden_layers"] == architecture.num_wide_layers
        if isinstance(hidden_size, int) and isinstance(num_heads, int) and num_heads:
            config["query_pre_attn_scalar"] = hidden_size // num_heads if is_wide else head_dim
        config.update(_sliding_pattern(file))
    return config


def _refuse_unknown(file: GgufFile, architecture: Architecture) -> None:
    """Raise CheckpointError where a field of the model may change what it computes, and is not read."""
    for key in _EXPERTS:
        if _value(file, key):
            raise CheckpointError(f"{file.path}: {_key(file, key)} is {_value(file, key)}; experts are not supported")
    known = {*_FIELDS.values(), *architecture.fields.values(), *_READ, *_HARMLESS}
    start = _key(file, "")
    for key, value in file.metadata.items():
        neutral: tuple[Any, ...] = (True,) if key.endswith(".attention.causal") else (None, 0, "", [])
        if key.startswith(start) and key.removeprefix(start) not in known and value not in neutral:
            raise CheckpointError(
                f"{file.path}: {key} is {value!r:.80}, a field that is not known with this architecture, so the text "
                "might not be the model's"
            )
    head_dim, value_dim = _value(file, "attention.key_length"), _value(file, "attention.value_length")
    if value_dim is not None and head_dim is not None and value_dim != head_dim:
        raise CheckpointError(f"{file.path}: values of {value_dim} beside keys of {head_dim} are not supported")


def _rotated_share(file: GgufFile, config: dict[str, Any]) -> float:
    """Which part of a head is rotated. Fields that are no sizes are left to who checks them."""
    rotated, head_dim = _value(file, "rope.dimension_count"), config.get("head_dim")
    hidden_size, num_heads = config["hidden_size"], config["num_attention_heads"]
    if head_dim is None and isinstance(hidden_size, int) and isinstance(num_heads, int) and num_heads:
        head_dim = hidden_size // num_heads
    return rotated / head_dim if isinstance(rotated, int) and isinstance(head_dim, int) and head_dim else 1.0


def _sliding_pattern(file: GgufFile) -> dict[str, Any]:
    """Which layers have a window, where a file says it: every so many-th one has none, or each by itself."""
    pattern = _value(file, "attention.sliding_window_pattern")
    if isinstance(pattern, list):
        return {"layer_types": [SLIDING if slides else FULL for slides in pattern]}
    return {} if pattern is None else {"sliding_window_pattern": pattern}


def rows_in_checkpoint_order(num_heads: int, head_dim: int) -> np.ndarray:
    """Which stored row of queries or keys each row of the checkpoint is, where a file's rotation takes neighbours."""
    stored = np.arange(num_heads * head_dim).reshape(num_heads, head_dim // 2, 2)
    return stored.swapaxes(1, 2).reshape(-1)


def _rope_scaling(file: GgufFile) -> dict[str, Any] | None:
    kind = _value(file, "rope.scaling.type")
    factor = _value(file, "rope.scaling.factor")
    if factor is None:  # as files had it before there were types
        factor = _value(file, "rope.scale_linear")
        kind = kind or ("linear" if factor not in (None, 1.0) else None)
    scale = _value(file, "rope.scaling.attn_factor")
    if scale not in (None, 1.0):
        raise CheckpointError(f"{file.path}: {_key(file, 'rope.scaling.attn_factor')} is {scale}, not supported here")
    if kind in (None, "none"):
        return None
    original = _value(file, "rope.scaling.original_context_length")
    scaling = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}
    if kind == "yarn":
        scaling |= {name: _value(file, f"rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
    return scaling


def _longrope(file: GgufFile) -> dict[str, Any] | None:
    """Phi-3's stretch of positions, whose divisors are tensors."""
    if not LONGROPE_FACTORS.values() & file.tensors.keys():
        return None
    scaling: dict[str, Any] = {
        "rope_type": "longrope",
        "attention_factor": _value(file, "rope.scaling.attn_factor"),
        "original_max_position_embeddings": _value(file, "rope.scaling.original_context_length"),
    }
    for name, tensor in LONGROPE_FACTORS.items():
        scaling[name] = read_floats(file.tensors[tensor]).tolist() if tensor in file.tensors else None
    return scaling


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
