"""What published configs say of a layer, without any weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="exporting needs torch: pip install '.[export]'")

import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.smollm3 import SmolLM3Config

from exporter.config import LayerShape, geometry_of, read_layer_shape
from exporter.families import FAMILIES
from exporter.known_fields import read_family
from flowspec_edge.errors import CheckpointError

PATH = Path("config.json")
LLAMA31_ROPE: dict[str, Any] = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA31_8B: dict[str, Any] = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": LLAMA31_ROPE,
}
MISTRAL_7B: dict[str, Any] = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
}


CPU = torch.device("cpu")


def read(
    config: dict[str, Any],
    architecture: str = "LlamaForCausalLM",
    max_context: int | None = None,
) -> LayerShape:
    return read_layer_shape(PATH, config, FAMILIES[architecture], max_context)


LLAMA3_32 = {**LLAMA31_ROPE, "factor": 32.0}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
FACTORS = [1.0 + i / 7 for i in range(64)]
LONGROPE: dict[str, Any] = {"rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS[::-1]}
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "llama3": {"rope_scaling": LLAMA31_ROPE},
    "llama3 of small heads": {"rope_scaling": LLAMA3_32, "head_dim": 64},
    "yarn": {"rope_scaling": YARN},
    "yarn with a scale": {"rope_scaling": {**YARN, "attention_factor": 0.7, "beta_fast": 16.0, "beta_slow": 2.0}},
    "yarn between whole pairs": {"rope_scaling": {**YARN, "truncate": False, "mscale": 0.5, "mscale_all_dim": 1.0}},
    "a part of each head": {"partial_rotary_factor": 0.75},
    "longrope": {"rope_scaling": LONGROPE, "original_max_position_embeddings": 4096},
    "longrope with a scale": {
        "rope_scaling": {**LONGROPE, "attention_factor": 1.3},
        "original_max_position_embeddings": 4096,
    },
}


@pytest.mark.parametrize("rope", ROPES)
def test_frequencies_and_scales_are_transformers(rope: str) -> None:
    config = {**LLAMA31_8B, "rope_scaling": None, **ROPES[rope]}
    kind = (config["rope_scaling"] or {}).get("rope_type", "default")
    head_dim = config.get("head_dim", 128)
    for max_context in (None, 4096):
        shape = read(config, max_context=max_context)
        init = ROPE_INIT_FUNCTIONS[kind]
        expected, scale = init(LlamaConfig(**config), CPU, seq_len=max_context or config["max_position_embeddings"])
        assert len(shape.rope_frequencies) == head_dim // 2 and shape.num_rotated == 2 * len(expected)
        np.testing.assert_allclose(shape.rope_frequencies[: len(expected)], expected.numpy(), rtol=4e-7)
        assert shape.rope_scale == pytest.approx(scale)
        assert any(name in "".join(shape.remarks) for name in ("long", "dynamic")) == (kind in ("longrope", "dynamic"))


def test_yarn_stretches_the_context() -> None:
    qwen = {**LLAMA31_8B, "max_position_embeddings": 32768, "rope_scaling": YARN}
    assert read(qwen, "Qwen2ForCausalLM").max_context == 131072
    del qwen["rope_scaling"]
    assert read(qwen, "Qwen2ForCausalLM").max_context == 32768


REFUSED_ROPES: dict[str, dict[str, Any]] = {
    "rope type 'mrope' is not supported; supported: default, linear, dynamic, llama3, yarn, longrope": {
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}
    },
    "rope_scaling has mrope_section = .*, which rope type 'default' is not known to have": {
        "rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}
    },
    "rope_scaling has alpha = 1000.0, which rope type 'dynamic' is not known to have": {
        "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0}
    },
    "long_factor has 64 numbers, expected 48": {
        "partial_rotary_factor": 0.75,
        "rope_scaling": LONGROPE,
        "original_max_position_embeddings": 4096,
    },
    "long_factor is None, expected a list": {"rope_scaling": {"type": "su"}, "original_max_position_embeddings": 4096},
    "rope_parameters are given for chunked_attention": {
        "rope_parameters": {"full_attention": YARN, "chunked_attention": YARN}
    },
    "partial_rotary_factor 1.5 of heads of 128": {"partial_rotary_factor": 1.5},
}


@pytest.mark.parametrize("text", REFUSED_ROPES)
def test_ropes_that_no_table_has_are_refused_by_name(text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        read({**LLAMA31_8B, "rope_scaling": None, **REFUSED_ROPES[text]})


def test_ropes_of_each_type_of_layers_are_read() -> None:
    """As transformers 5 writes them: read as one, they would all have the default base."""
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    gemma = {**LLAMA31_8B, "head_dim": 128, "sliding_window": 512}
    flat = {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 1e4}
    expected = read({**gemma, **flat}, "Gemma3ForCausalLM")
    del gemma["rope_theta"], gemma["rope_scaling"]
    found = read({**gemma, "rope_parameters": nested}, "Gemma3ForCausalLM")
    assert found == expected
    assert found.rope_frequencies[1] == pytest.approx(1e6 ** (-1 / 64) / 8)
    assert found.sliding_rope_frequencies[1] == pytest.approx(1e4 ** (-1 / 64))
    llama = read({**gemma, "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5e5}}})
    assert llama.rope_frequencies[1] == pytest.approx(5e5 ** (-1 / 64))


def test_rope_as_transformers_5_writes_it() -> None:
    config = {name: value for name, value in LLAMA31_8B.items() if name not in ("rope_theta", "rope_scaling")}
    config["rope_parameters"] = {**LLAMA31_ROPE, "rope_theta": 500000.0}
    assert read(config) == read(LLAMA31_8B)


def test_frequencies_survive_the_manifest_exactly() -> None:
    found: np.ndarray = np.array(read(LLAMA31_8B).rope_frequencies)
    np.testing.assert_array_equal(found.astype(np.float32).astype(np.float64), found)


def test_a_context_that_was_stretched_is_found_in_its_own_field() -> None:
    vicuna = {**LLAMA31_8B, "max_position_embeddings": 4096, "max_sequence_length": 16384}
    assert read({**vicuna, "rope_scaling": {"type": "linear", "factor": 4.0}}).max_context == 16384
    assert read({**vicuna, "rope_scaling": None}).max_context == 4096


@pytest.mark.parametrize("context", [0, 131073])
def test_a_context_beyond_the_models_is_refused(context: int) -> None:
    with pytest.raises(CheckpointError, match=f"--max-context {context} is outside 1 to 131072"):
        read(LLAMA31_8B, max_context=context)


def sliding_layers(config: dict[str, Any], architecture: str) -> tuple[int | None, list[int]]:
    shape = read({**MISTRAL_7B, "num_hidden_layers": 6, "num_key_value_heads": 4, **config}, architecture)
    assert shape.max_context == MISTRAL_7B["max_position_embeddings"], "a window does not limit it"
    return shape.window, sorted(shape.sliding_layers)


WINDOWS: dict[str, tuple[str, dict[str, Any], tuple[int | None, list[int]]]] = {
    "Mistral": ("MistralForCausalLM", {"sliding_window": 512}, (512, [0, 1, 2, 3, 4, 5])),
    "Mistral that says nothing": ("MistralForCausalLM", {}, (4096, [0, 1, 2, 3, 4, 5])),
    "Mistral without": ("MistralForCausalLM", {"sliding_window": None}, (None, [])),
    "Mistral whose window is its context": ("MistralForCausalLM", {"sliding_window": 32768}, (None, [])),
    "Ministral": (
        "MinistralForCausalLM",
        {"sliding_window": 512, "layer_types": ["full_attention", *["sliding_attention"] * 3] * 2},
        (512, [1, 2, 3, 5]),
    ),
    "Qwen2": ("Qwen2ForCausalLM", {"sliding_window": 512}, (None, [])),
    "Qwen2 with windows": (
        "Qwen2ForCausalLM",
        {"sliding_window": 512, "use_sliding_window": True, "max_window_layers": 4},
        (512, [4, 5]),
    ),
    "Gemma 2": ("Gemma2ForCausalLM", {"head_dim": 128}, (4096, [0, 2, 4])),
    "Gemma 3": ("Gemma3ForCausalLM", {"head_dim": 128, "sliding_window": 512}, (512, [0, 1, 2, 3, 4])),
    "Gemma 3, every third": (
        "Gemma3ForCausalLM",
        {"head_dim": 128, "sliding_window": 512, "sliding_window_pattern": 3},
        (512, [0, 1, 3, 4]),
    ),
    "Phi-3": ("Phi3ForCausalLM", {"sliding_window": 2047}, (2047, [0, 1, 2, 3, 4, 5])),
    "SmolLM3": ("SmolLM3ForCausalLM", {"use_sliding_window": True, "sliding_window": 512}, (512, [3])),
    "Llama": ("LlamaForCausalLM", {}, (None, [])),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_which_layers_have_a_window(name: str) -> None:
    architecture, config, expected = WINDOWS[name]
    assert sliding_layers(config, architecture) == expected


@pytest.mark.parametrize("types", [["full_attention"], ["chunked_attention"] * 6, "sliding_attention"])
def test_other_types_of_layers_are_refused(types: Any) -> None:
    with pytest.raises(CheckpointError, match="layer_types is .*, expected full_attention or sliding_attention for"):
        sliding_layers({"layer_types": types}, "MinistralForCausalLM")


def test_fields_that_are_left_out_have_their_familys_defaults() -> None:
    assert read({**MISTRAL_7B, "sliding_window": None}, "MistralForCausalLM").num_kv_heads == 8
    assert read(MISTRAL_7B).num_kv_heads == 32
    qwen3 = read({**MISTRAL_7B, "hidden_size": 1024, "num_attention_heads": 32}, "Qwen3ForCausalLM")
    assert (qwen3.head_dim, str(qwen3.qk_norm), qwen3.qkv_bias) == (128, "head", False)
    qwen2 = read(MISTRAL_7B, "Qwen2ForCausalLM")
    assert (qwen2.qkv_bias, qwen2.output_bias, str(qwen2.qk_norm)) == (True, False, "none")


@pytest.mark.parametrize("rope", ["llama3", [1, 2]])
def test_rope_that_is_no_object_is_refused(rope: Any) -> None:
    with pytest.raises(CheckpointError, match="rope_scaling is .*, expected an object"):
        read({**LLAMA31_8B, "rope_scaling": rope})


PUBLISHED: dict[str, dict[str, Any]] = {
    "SmolLM2-135M-Instruct": {
        "architectures": ["LlamaForCausalLM"],
        "is_llama_config": True,
        "rope_interleaved": False,
        "pretraining_tp": 1,
        "attention_dropout": 0.0,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "initializer_range": 0.041666666666666664,
        "torch_dtype": "bfloat16",
    },
    "Phi-4-mini-instruct": {
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "embd_pdrop": 0.0,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "sliding_window": 262144,
    },
    "gemma-2-2b-it": {
        "architectures": ["Gemma2ForCausalLM"],
        "cache_implementation": "hybrid",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_size": 4096,
        "final_logit_softcapping": 30.0,
    },
    "gemma-3-1b-it": {
        "architectures": ["Gemma3ForCausalLM"],
        "cache_implementation": "hybrid",
        "attn_logit_softcapping": None,
        "rope_local_base_freq": 10000,
        "sliding_window_pattern": 6,
    },
    "granite-3.1-2b-instruct": {
        "architectures": ["GraniteForCausalLM"],
        "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.22,
    },
}
"""What is special in published configs, so that none of it is refused."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_taken(name: str) -> None:
    assert read_family(PATH, {**LLAMA31_8B, **PUBLISHED[name]})[0] == PUBLISHED[name]["architectures"][0]


CONFIGS = (
    *(LlamaConfig, MistralConfig, MinistralConfig, Qwen2Config, Qwen3Config, Gemma2Config, Gemma3TextConfig),
    *(Phi3Config, SmolLM3Config, GraniteConfig, Olmo2Config),
)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_what_transformers_writes_of_a_family_is_taken(config: type[Any]) -> None:
    """All of its fields, not only those that differ; and those that are left out have its values."""
    written = config().to_dict()
    architecture = config.__name__.replace("Text", "").replace("Config", "ForCausalLM")
    read_family(PATH, {**written, "architectures": [architecture]})
    for name, value in FAMILIES[architecture].defaults.items():
        assert written.get(name, value) in (value, None), name


FOREIGN: dict[str, dict[str, Any]] = {
    "hidden_act 'gelu' is not supported; supported: silu, gelu_pytorch_tanh": {"hidden_act": "gelu"},
    "num_local_experts is 8, a field that is not known with LlamaForCausalLM": {"num_local_experts": 8},
    "partial_rotary_factor is 0.5, which is not supported with LlamaForCausalLM": {"partial_rotary_factor": 0.5},
    "logit_scale is 0.0625, which is not supported with LlamaForCausalLM": {"logit_scale": 0.0625},
    "embedding_multiplier is 12.0, which is not supported": {"embedding_multiplier": 12.0},
    "clip_qkv is 8.0, a field that is not known": {"clip_qkv": 8.0},
    "use_qk_norm is True, a field that is not known": {"use_qk_norm": True},
    "sliding_window is 4096, a field that is not known": {"sliding_window": 4096},
    "is_causal is False, which is not supported": {"is_causal": False},
}


@pytest.mark.parametrize("text", FOREIGN)
def test_fields_that_may_change_a_text_are_refused_by_name(text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        _, config = read_family(PATH, {"architectures": ["LlamaForCausalLM"], **LLAMA31_8B, **FOREIGN[text]})
        read(dict(config))


@pytest.mark.parametrize(
    ("architecture", "field"),
    [
        ("Gemma2ForCausalLM", {"hidden_act": "gelu"}),
        ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}),
        ("Phi3ForCausalLM", {"full_attn_mod": 2}),
        ("Olmo2ForCausalLM", {"sliding_window": 4096}),
    ],
)
def test_values_of_a_family_that_are_of_no_model_are_refused(architecture: str, field: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=next(iter(field))):
        read_family(PATH, {"architectures": [architecture], **LLAMA31_8B, **field})


@pytest.mark.parametrize(
    ("architecture", "field"),
    [
        ("Qwen2ForCausalLM", {"max_window_layers": None}),
        ("Gemma3ForCausalLM", {"sliding_window_pattern": 0}),
        ("Gemma3ForCausalLM", {"sliding_window": "wide"}),
        ("SmolLM3ForCausalLM", {"no_rope_layer_interval": "four"}),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}),
        ("GraniteForCausalLM", {"residual_multiplier": 0}),
        ("LlamaForCausalLM", {"hidden_act": ["silu"]}),
        ("LlamaForCausalLM", {"num_hidden_layers": 0}),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(architecture: str, field: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=next(iter(field))):
        read({**LLAMA31_8B, "head_dim": 128, **field}, architecture)


def test_what_is_special_of_families_is_read() -> None:
    gemma = read({**LLAMA31_8B, "head_dim": 128, "query_pre_attn_scalar": 64}, "Gemma2ForCausalLM")
    assert (gemma.activation, gemma.embedding_scale, gemma.norm_offset) == ("gelu_tanh", 64.0, 1.0)
    assert (gemma.score_scale, gemma.score_cap, gemma.logit_cap) == (0.125, 50.0, 30.0)
    granite = read({**LLAMA31_8B, **PUBLISHED["granite-3.1-2b-instruct"]}, "GraniteForCausalLM")
    assert (granite.embedding_scale, granite.residual_scale, granite.logit_divisor) == (12.0, 0.22, 8.0)
    assert granite.score_scale == 0.015625
    smollm = read({**LLAMA31_8B, "num_hidden_layers": 8}, "SmolLM3ForCausalLM")
    assert smollm.unrotated_layers == {3, 7}
    phi = read({**LLAMA31_8B, "partial_rotary_factor": 0.75, "rope_scaling": None}, "Phi3ForCausalLM")
    assert (phi.num_rotated, phi.head_dim) == (96, 128)
    assert phi.stored_shapes()["self_attn.qkv_proj.weight"] == (32 * 128 + 2 * 8 * 128, 4096)
    assert phi.stored_shapes()["mlp.gate_up_proj.weight"] == (2 * 14336, 4096)
    geometry = geometry_of(gemma, 4, 1000)
    assert geometry.window == 4096 and geometry.ropes == [list(gemma.rope_frequencies)] * 2
