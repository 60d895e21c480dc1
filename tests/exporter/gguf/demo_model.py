"""The demo model as a GGUF file of the types that people have: `Q4_1` layers, and one `Q8_0` matrix for embedding and
head.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from safetensors.numpy import load_file

from exporter.config import read_layer_shape
from exporter.families import FAMILIES
from exporter.gguf.config import gguf_name
from exporter.gguf.model import EMBEDDING
from exporter.gguf.tokenizer import TokenType
from tests.exporter.gguf.conftest import write_gguf
from tests.exporter.gguf.models import tensors_of

DEMO_MODEL = Path(__file__).parents[3] / "exporter/demo_model/target"


def write_demo_gguf(path: Path) -> Path:
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    weights = {name: weight.astype(np.float32) for name, weight in load_file(DEMO_MODEL / "model.safetensors").items()}
    shape = read_layer_shape(DEMO_MODEL / "config.json", config, FAMILIES["LlamaForCausalLM"])
    tensors = tensors_of(weights, "F32", shape, in_pairs=True)
    for name, (_, rows) in tensors.items():
        if rows.ndim == 2:
            kind = "Q8_0" if name == gguf_name(EMBEDDING) else "Q4_1"
            tensors[name] = kind, quantize(rows, GGMLQuantizationType[kind])
    return write_gguf(path, {**_shape(config), **_tokenizer(config)}, tensors)


def _shape(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.key_length": config["head_dim"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.freq_base": config["rope_theta"],
        "llama.rope.dimension_count": config["head_dim"],
    }


def _tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    stored = json.loads((DEMO_MODEL / "tokenizer.json").read_text())
    ids, special = stored["model"]["vocab"], {token["content"] for token in stored["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    fields = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [int(TokenType.CONTROL if token in special else TokenType.NORMAL) for token in tokens],
        "merges": [" ".join(pair) for pair in stored["model"]["merges"]],
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
        "add_bos_token": False,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
