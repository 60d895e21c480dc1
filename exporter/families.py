"""The families of models that are exported, and how each differs from plain Llama.

What transformers computes for a family is what its graphs compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from exporter.rope import SLIDING
from flowspec_edge.errors import CheckpointError

Config = Mapping[str, Any]
OfLayer = Callable[[Config, int], bool]


@dataclass(frozen=True)
class Norms:
    """The names of a layer's norms; None where there is none.

    Those ``before`` attention and MLP norm what these read, those ``after`` them what they give, before it is added.
    """

    before_attention: str | None
    after_attention: str | None
    before_mlp: str | None
    after_mlp: str | None

    @property
    def names(self) -> tuple[str, ...]:
        places = self.before_attention, self.after_attention, self.before_mlp, self.after_mlp
        return tuple(name for name in places if name is not None)


BEFORE = Norms("input_layernorm", None, "post_attention_layernorm", None)
AROUND = Norms("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
AFTER = Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")

FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Matrices that Phi-3 stores as one, in the order of their rows."""
ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def _none_slide(config: Config, layer: int) -> bool:
    return False


def _all_slide(config: Config, layer: int) -> bool:
    return config.get("sliding_window") is not None


def _last_slide(config: Config, layer: int) -> bool:
    return bool(config.get("use_sliding_window")) and layer >= config["max_window_layers"]


def _unrotated_slide(config: Config, layer: int) -> bool:
    return bool(config.get("use_sliding_window")) and not _rotates(config, layer)


def _all_but_every_nth_slide(config: Config, layer: int) -> bool:
    return (layer + 1) % int(config["sliding_window_pattern"]) != 0


def _rotates(config: Config, layer: int) -> bool:
    """Of SmolLM3."""
    given = config.get("no_rope_layers")
    return bool((layer + 1) % config["no_rope_layer_interval"] if given is None else given[layer])


@dataclass(frozen=True, kw_only=True)
class Family:
    """How an architecture differs from plain Llama.

    Attributes:
        defaults: transformers' values of fields that a config leaves out.
        reads: further fields that are read.
        must_be: values that further fields have where the model is one that is exported.
        qkv_bias: q, k and v have biases and o has none, whatever the config says of ``attention_bias``.
        qk_norm: whether queries and keys are normed, each head or the whole projection by itself.
        norms: where a layer's norms are.
        norm_offset: what is added to the stored weights of norms.
        activation: the field that names the activation function.
        is_fused: whether matrices are stored as FUSED.
        scales_embedding: whether rows of the embedding are multiplied by the root of their size.
        slides: whether a layer has a window, where the config has no ``layer_types``.
        rotates: whether a layer has a rotary embedding.
    """

    defaults: Config
    reads: frozenset[str] = frozenset()
    must_be: Config = field(default_factory=dict)
    qkv_bias: bool = False
    qk_norm: Literal["none", "head", "projection"] = "none"
    norms: Norms = BEFORE
    norm_offset: float = 0.0
    activation: str = "hidden_act"
    is_fused: bool = False
    scales_embedding: bool = False
    slides: OfLayer = _none_slide
    rotates: OfLayer = lambda config, layer: True


_BASE: Config = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu"}
_QWEN: Config = {**_BASE, "max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096}
_QWEN = {**_QWEN, "max_window_layers": 28}
_MISTRAL = Family(
    defaults={**_BASE, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    reads=frozenset({"sliding_window", "layer_types"}),
    slides=_all_slide,
)
_WINDOWED = frozenset({"sliding_window", "layer_types", "use_sliding_window", "max_window_layers"})
_GEMMA: Config = {
    "rms_norm_eps": 1e-6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_GEMMA_READS = frozenset(
    {
        *("query_pre_attn_scalar", "sliding_window", "layer_types", "sliding_window_pattern", "hidden_activation"),
        *("attn_logit_softcapping", "final_logit_softcapping"),
    }
)

FAMILIES = {
    "LlamaForCausalLM": Family(defaults={**_BASE, "max_position_embeddings": 2048}),
    "MistralForCausalLM": _MISTRAL,
    "MinistralForCausalLM": _MISTRAL,
    "Qwen2ForCausalLM": Family(defaults=_QWEN, qkv_bias=True, reads=_WINDOWED, slides=_last_slide),
    "Qwen3ForCausalLM": Family(
        defaults={**_QWEN, "head_dim": 128}, qk_norm="head", reads=_WINDOWED, slides=_last_slide
    ),
    "Gemma2ForCausalLM": Family(
        defaults={
            **_GEMMA,
            **{"rope_theta": 10000.0, "max_position_embeddings": 8192, "sliding_window_pattern": 2},
            **{"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        },
        reads=_GEMMA_READS,
        must_be={"hidden_act": "gelu_pytorch_tanh", "sliding_window_size": 4096},
        norms=AROUND,
        norm_offset=1.0,
        activation="hidden_activation",
        scales_embedding=True,
        slides=_all_but_every_nth_slide,
    ),
    "Gemma3ForCausalLM": Family(
        defaults={
            **_GEMMA,
            **{"rope_theta": 1e6, "max_position_embeddings": 131072, "sliding_window_pattern": 6},
            "rope_local_base_freq": 10000.0,
        },
        reads=_GEMMA_READS | {"rope_local_base_freq"},
        must_be={"attn_logit_softcapping": None},
        qk_norm="head",
        norms=AROUND,
        norm_offset=1.0,
        activation="hidden_activation",
        scales_embedding=True,
        slides=_all_but_every_nth_slide,
    ),
    "Phi3ForCausalLM": Family(
        defaults={
            **_BASE,
            **{"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
        },
        reads=frozenset({"sliding_window", "partial_rotary_factor", "original_max_position_embeddings"}),
        must_be={"full_attn_mod": 1, "interpolate_factor": 1},
        is_fused=True,
        slides=_all_slide,
    ),
    "SmolLM3ForCausalLM": Family(
        defaults={
            **_BASE,
            **{"rope_theta": 2e6, "max_position_embeddings": 32768, "num_key_value_heads": 4},
            **{"no_rope_layer_interval": 4, "tie_word_embeddings": True},
        },
        reads=_WINDOWED | {"no_rope_layers", "no_rope_layer_interval"},
        slides=_unrotated_slide,
        rotates=_rotates,
    ),
    "GraniteForCausalLM": Family(
        defaults={**_BASE, "max_position_embeddings": 2048, "attention_multiplier": 1.0},
        reads=frozenset({"embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"}),
    ),
    "Olmo2ForCausalLM": Family(
        defaults={**_BASE, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
        qk_norm="projection",
        norms=AFTER,
    ),
}
"""Llama 1, 2 and 3, TinyLlama, SmolLM 1 and 2, and Vicuna are all LlamaForCausalLM; Phi-4 is Phi3ForCausalLM."""


_COUNTS = {"max_window_layers": 0, "sliding_window_pattern": 1, "no_rope_layer_interval": 1}
"""Fields by which layers are told apart, and the least values that they can have."""


def has_window(path: Path, config: Config, family: Family, layer: int) -> bool:
    """Whether a layer sees the last rows of a window alone.

    Raises:
        CheckpointError: the config has other types of layers, or does not tell them apart.
    """
    types = config.get("layer_types") if "layer_types" in family.reads else None
    if types is None:
        for field, least in _COUNTS.items():
            if field in family.defaults and (not isinstance(config[field], int) or config[field] < least):
                raise CheckpointError(f"{path}: {field} is {config[field]!r:.80}, expected a number from {least} on")
        return family.slides(config, layer)
    known = {"full_attention", SLIDING}
    if not isinstance(types, list) or len(types) <= layer or not known.issuperset(map(str, types)):
        raise CheckpointError(
            f"{path}: layer_types is {types!r:.120}, expected {' or '.join(sorted(known))} for each layer"
        )
    return bool(types[layer] == SLIDING)
