"""What published configs say of a layer, without any weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="exporting needs torch: pip install '.[export]'")

import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from exporter.config import FAMILIES, LayerShape, read_layer_shape
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


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_llama3_frequencies_are_transformers(factor: float, head_dim: int) -> None:
    rope = {**LLAMA31_ROPE, "factor": factor}
    config = {**LLAMA31_8B, "head_dim": head_dim, "rope_scaling": rope}
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**config), CPU)
    np.testing.assert_allclose(read(config).rope_frequencies, expected.numpy(), rtol=3e-7)


def test_linear_frequencies_are_transformers() -> None:
    config = {**LLAMA31_8B, "rope_scaling": {"type": "linear", "factor": 4.0}}
    expected, _ = ROPE_INIT_FUNCTIONS["linear"](LlamaConfig(**config), CPU)
    np.testing.assert_array_equal(read(config).rope_frequencies, expected.numpy())


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


def test_a_window_limits_the_context_of_models_that_use_it() -> None:
    mistral = {**MISTRAL_7B, "sliding_window": 4096}
    with pytest.raises(CheckpointError, match="sliding_window 4096 is below the context of 32768"):
        read(mistral, "MistralForCausalLM")
    assert read(mistral, "MistralForCausalLM", 4096).max_context == 4096
    assert read({**mistral, "sliding_window": None}, "MistralForCausalLM").max_context == 32768
    with pytest.raises(CheckpointError, match="sliding_window 4096"):  # as transformers, where the field is left out
        read(MISTRAL_7B, "MistralForCausalLM")
    qwen = {**mistral, "num_key_value_heads": 4, "use_sliding_window": False}
    assert read(qwen, "Qwen2ForCausalLM").max_context == 32768
    with pytest.raises(CheckpointError, match="sliding_window 4096"):
        read({**qwen, "use_sliding_window": True}, "Qwen2ForCausalLM")


def test_fields_that_are_left_out_have_their_familys_defaults() -> None:
    assert read({**MISTRAL_7B, "sliding_window": None}, "MistralForCausalLM").num_kv_heads == 8
    assert read(MISTRAL_7B).num_kv_heads == 32
    qwen3 = read({**MISTRAL_7B, "hidden_size": 1024, "num_attention_heads": 32}, "Qwen3ForCausalLM")
    assert (qwen3.head_dim, qwen3.qk_norm, qwen3.qkv_bias) == (128, True, False)
    qwen2 = read(MISTRAL_7B, "Qwen2ForCausalLM")
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.qk_norm) == (True, False, False)


@pytest.mark.parametrize("rope", ["llama3", [1, 2]])
def test_rope_that_is_no_object_is_refused(rope: Any) -> None:
    with pytest.raises(CheckpointError, match="rope_scaling is .*, expected an object"):
        read({**LLAMA31_8B, "rope_scaling": rope})
