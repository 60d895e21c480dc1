"""Small checkpoints of random weights in the exact published layout, and the EAGLE-1 heads that go with them."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

DEMO_MODEL = Path(__file__).parents[2] / "exporter/demo_model"
VOCAB = 2048  # the demo model's tokenizer serves them all

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 0,
}


def save_checkpoint(directory, *, max_shard_size="5GB", **changes):
    """A ``LlamaForCausalLM`` as transformers saves it; returns the model."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "tie_word_embeddings": False, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # random norms too, so that none can be left out unseen
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    shutil.copy(DEMO_MODEL / "target/tokenizer.json", directory)
    return model


def save_eagle(directory, *, has_bias=True, hidden_size=64, **changes):
    """An EAGLE-1 head as published: fc, one layer without input norm, a copy of the embedding."""
    directory.mkdir()
    config = {
        **SHAPE,
        "hidden_size": hidden_size,
        "num_hidden_layers": 1,
        "architectures": ["LlamaForCausalLM"],
        **changes,
    }
    (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    kv_size = hidden_size // 2
    sizes = {
        "fc.weight": (hidden_size, 2 * hidden_size),
        "embed_tokens.weight": (VOCAB, hidden_size),
        "layers.0.self_attn.q_proj.weight": (hidden_size, hidden_size),
        "layers.0.self_attn.k_proj.weight": (kv_size, hidden_size),
        "layers.0.self_attn.v_proj.weight": (kv_size, hidden_size),
        "layers.0.self_attn.o_proj.weight": (hidden_size, hidden_size),
        "layers.0.post_attention_layernorm.weight": (hidden_size,),
        "layers.0.mlp.gate_proj.weight": (96, hidden_size),
        "layers.0.mlp.up_proj.weight": (96, hidden_size),
        "layers.0.mlp.down_proj.weight": (hidden_size, 96),
    }
    if has_bias:
        sizes["fc.bias"] = (hidden_size,)
    tensors = {name: torch.randn(*size) * 0.1 for name, size in sizes.items()}
    save_file(tensors, directory / "model.safetensors")
    return tensors
