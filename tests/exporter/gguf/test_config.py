from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.config import LayerShape, read_layer_shape
from exporter.families import FAMILIES
from exporter.gguf.config import gguf_name, huggingface_config, rows_in_checkpoint_order
from exporter.gguf.file import GgufFile
from exporter.known_fields import read_family
from flowspec_edge.errors import CheckpointError

Write = Callable[..., Path]
LLAMA: dict[str, Any] = {
    "block_count": 2,
    "context_length": 512,
    "embedding_length": 128,
    "feed_forward_length": 256,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 100000.0,
    "rope.dimension_count": 32,
}
EMBEDDING = {"token_embd.weight": ("F32", np.zeros((50, 128), np.float32))}


def config_of(
    write: Write, values: dict[str, Any] | None = None, tensors: Any = EMBEDDING, architecture: str = "llama"
) -> dict[str, Any]:
    own = {f"{architecture}.{key}": value for key, value in {**LLAMA, **(values or {})}.items() if value is not None}
    return huggingface_config(GgufFile.open(write(own, tensors, architecture=architecture)))


def shape_of(config: dict[str, Any]) -> LayerShape:
    architecture, whole = read_family(Path("model.gguf"), config)
    return read_layer_shape(Path("model.gguf"), whole, FAMILIES[architecture])


def test_a_llama_is_read_as_its_checkpoint_would_be(write: Write) -> None:
    config = config_of(write)
    assert (config["num_hidden_layers"], config["vocab_size"], config["tie_word_embeddings"]) == (2, 50, True)
    shape = shape_of(config)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.max_context) == (4, 2, 32, 512)
    assert shape.rms_norm_eps == pytest.approx(1e-5)
    assert shape.rope_frequencies[1] == pytest.approx(100000.0 ** (-2 / 32))
    assert not (shape.qkv_bias or shape.output_bias or shape.mlp_bias) and shape.qk_norm == "none"


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_families_keep_their_own_features(architecture: str, write: Write) -> None:
    values = {"attention.key_length": 64, "rope.dimension_count": None}
    shape = shape_of(config_of(write, values, architecture=architecture))
    assert shape.qkv_bias == (architecture == "qwen2")
    assert shape.qk_norm == ("head" if architecture == "qwen3" else "none")
    assert shape.head_dim == 64


def test_a_head_of_its_own_and_biases_are_seen_in_the_tensors(write: Write) -> None:
    tensors = {
        **EMBEDDING,
        "output.weight": ("F32", np.zeros((50, 128), np.float32)),
        "blk.0.attn_output.bias": ("F32", np.zeros(128, np.float32)),
        "blk.0.ffn_gate.bias": ("F32", np.zeros(256, np.float32)),
    }
    config = config_of(write, tensors=tensors)
    assert not config["tie_word_embeddings"]
    shape = shape_of(config)
    assert shape.qkv_bias and shape.output_bias and shape.mlp_bias


def test_a_linear_stretch_of_positions_is_read(write: Write) -> None:
    for values in ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope.scale_linear": 4.0}):
        shape = shape_of(config_of(write, values))
        assert shape.rope_frequencies[0] == pytest.approx(0.25)
    assert shape_of(config_of(write, {"rope.scaling.type": "none"})).rope_frequencies[0] == 1.0


def test_lists_with_one_value_for_all_layers_are_read(write: Write) -> None:
    assert config_of(write, {"feed_forward_length": [256, 256]})["intermediate_size"] == 256
    with pytest.raises(CheckpointError, match=r"layers of different sizes \(\[256, 512\]"):
        config_of(write, {"feed_forward_length": [256, 512]})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_count": None}, "llama.block_count is missing"),
        ({"expert_count": 8}, "llama.expert_count is 8; experts are not supported"),
        ({"rope.scaling.type": "mrope", "rope.scaling.factor": 2.0}, "rope type 'mrope' is not supported"),
        ({"rope.scaling.attn_factor": 1.2}, "rope.scaling.attn_factor is 1.2"),
        ({"rope.dimension_count": 16}, "partial_rotary_factor is 0.5, which is not supported with LlamaForCausalLM"),
        ({"attention.sliding_window": 4096}, "llama.attention.sliding_window is 4096, a field that is not known"),
        ({"attention.temperature_scale": 0.1}, "llama.attention.temperature_scale is 0.1.*, a field that is not known"),
        ({"attention.causal": False}, "llama.attention.causal is False"),
        ({"attention.key_length": 32, "attention.value_length": 64}, "values of 64 beside keys of 32"),
        ({"attention.head_count": 0}, "num_attention_heads is 0, expected a positive integer"),
        ({"attention.head_count": "four"}, "num_attention_heads is 'four', expected a positive integer"),
        ({"embedding_length": "wide"}, "hidden_size is 'wide', expected a positive integer"),
    ],
)
def test_what_no_graph_computes_is_refused(values: dict[str, Any], message: str, write: Write) -> None:
    with pytest.raises(CheckpointError, match=message):
        shape_of(config_of(write, values))


def test_other_architectures_are_refused_by_name(write: Write) -> None:
    with pytest.raises(
        CheckpointError, match="architecture 'mamba' is not supported; supported: llama, qwen2, qwen3, gem"
    ):
        config_of(write, architecture="mamba")


def test_a_vocabulary_alone_is_refused(write: Write) -> None:
    with pytest.raises(CheckpointError, match=r"token_embd\.weight is missing; is this file a vocabulary alone\?"):
        config_of(write, tensors={})


def test_names_of_tensors() -> None:
    assert gguf_name("model.layers.12.self_attn.q_proj.weight") == "blk.12.attn_q.weight"
    assert gguf_name("model.layers.0.self_attn.k_norm.weight") == "blk.0.attn_k_norm.weight"
    assert gguf_name("model.layers.3.input_layernorm.weight") == "blk.3.attn_norm.weight"
    assert gguf_name("model.layers.3.mlp.down_proj.bias") == "blk.3.ffn_down.bias"
    assert gguf_name("lm_head.weight") == "output.weight"


def test_rows_of_heads_are_put_back_in_the_order_of_the_checkpoint() -> None:
    """As convert_hf_to_gguf.py stores them: halves of a head, ``[heads, 2, head_dim / 2]``, become neighbours."""
    num_heads, head_dim = 3, 8
    checkpoint = np.arange(num_heads * head_dim)
    stored = checkpoint.reshape(num_heads, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)
    assert (stored[rows_in_checkpoint_order(num_heads, head_dim)] == checkpoint).all()
