"""Small checkpoints of random weights in the exact published layouts, and the EAGLE-1 heads that go with them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config, Qwen3Config

DEMO_MODEL = Path(__file__).parents[2] / "exporter/demo_model"
torch.set_num_threads(1)  # models this small are slower with more

VOCAB = 2048  # the demo model's tokenizer serves them all

SHAPE: dict[str, Any] = {
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
    "tie_word_embeddings": False,
}

LLAMA3_ROPE = {  # so that with heads of 16 each of the three bands of wavelengths has a frequency
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}


def save_checkpoint(
    directory: Path,
    config_class: type[Any] = LlamaConfig,
    *,
    max_shard_size: str = "5GB",
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> PreTrainedModel:
    """Save a checkpoint as transformers does, and return the model."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config_class(**{**SHAPE, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # random norms and biases too, so that none can be left out unseen
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    shutil.copy(DEMO_MODEL / "target/tokenizer.json", directory)
    saved: PreTrainedModel = model
    return saved


def edit_config(directory: Path, *absent: str, **changes: Any) -> None:
    """Set fields of ``config.json`` and take others out."""
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if name not in absent}))


def save_llama1(directory: Path) -> None:
    """As converted in 2023: no grouped heads in the config, rotary buffers beside the weights."""
    save_checkpoint(directory, num_key_value_heads=4, dtype=torch.float16)
    edit_config(
        directory, "num_key_value_heads", "rope_theta", "rope_scaling", "attention_bias", "mlp_bias", "head_dim"
    )
    path = directory / "model.safetensors"
    inverse = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(3)}
    save_file({**load_file(path), **inverse}, path, metadata={"format": "pt"})


def save_pickled(directory: Path, num_shards: int, **changes: Any) -> None:
    """``pytorch_model.bin``, in parts where there are several."""
    save_checkpoint(directory, **changes)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    if num_shards == 1:
        torch.save(tensors, directory / "pytorch_model.bin")
        return
    names = [f"pytorch_model-{part:05d}-of-{num_shards:05d}.bin" for part in range(1, num_shards + 1)]
    weight_map = {name: names[place % num_shards] for place, name in enumerate(tensors)}
    for shard in names:
        torch.save({name: tensors[name] for name, owner in weight_map.items() if owner == shard}, directory / shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def save_sentencepiece(directory: Path) -> sentencepiece.SentencePieceProcessor:
    """Replace ``tokenizer.json`` by a tokenizer like Llama's, BPE with bytes for unknown characters, and return it."""
    (directory / "tokenizer.json").unlink()
    path = directory / "tokenizer.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(Path(__file__).read_text().splitlines()),
            model_writer=file,
            model_type="bpe",
            vocab_size=500,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def save_vicuna_16k(directory: Path) -> None:
    save_pickled(
        directory, 2, num_key_value_heads=4, rope_scaling={"type": "linear", "factor": 4.0}, max_position_embeddings=24
    )
    edit_config(directory, max_sequence_length=96)


BF16: dict[str, Any] = {"dtype": torch.bfloat16}
FP16: dict[str, Any] = {"dtype": torch.float16}
LLAMA3: dict[str, Any] = {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE, **BF16}

FAMILIES: dict[str, Callable[[Path], object]] = {
    "Llama 1": save_llama1,
    "Llama 2 70B": lambda directory: save_checkpoint(directory, max_shard_size="200KB", **FP16),
    "Llama 3.1": lambda directory: save_checkpoint(directory, **LLAMA3),
    "Llama 3.2": lambda directory: save_checkpoint(directory, head_dim=32, tie_word_embeddings=True, **LLAMA3),
    "Llama with biases": lambda directory: save_checkpoint(directory, attention_bias=True, mlp_bias=True),
    "TinyLlama": lambda directory: save_checkpoint(directory, num_attention_heads=4, num_key_value_heads=1, **BF16),
    "SmolLM": lambda directory: save_checkpoint(
        directory, hidden_size=96, num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True, **BF16
    ),
    "Vicuna": lambda directory: save_pickled(directory, 1, num_key_value_heads=4, **FP16),
    "Vicuna 16k": save_vicuna_16k,
    "Mistral 0.1": lambda directory: save_checkpoint(directory, MistralConfig, sliding_window=96, **BF16),
    "Mistral Nemo": lambda directory: save_checkpoint(
        directory, MistralConfig, sliding_window=None, head_dim=32, **BF16
    ),
    "Qwen2.5": lambda directory: save_checkpoint(directory, Qwen2Config, rope_theta=1e6, **BF16),
    "Qwen2 0.5B": lambda directory: save_checkpoint(directory, Qwen2Config, tie_word_embeddings=True, **BF16),
    "Qwen3": lambda directory: save_checkpoint(directory, Qwen3Config, head_dim=48, rope_theta=1e6, **BF16),
}
"""Sizes are small, and all else is as published: names, types, shards, ties, and what a config says or leaves out."""


def save_eagle(
    directory: Path, *, has_bias: bool = True, hidden_size: int = 64, pickled: bool = False, **changes: Any
) -> dict[str, torch.Tensor]:
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
        "embed_tokens.weight": (config["vocab_size"], hidden_size),
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
    if config.get("qkv_bias"):  # heads for Qwen2
        sizes |= {
            f"layers.0.self_attn.{name}_proj.bias": (sizes[f"layers.0.self_attn.{name}_proj.weight"][0],)
            for name in "qkv"
        }
    tensors = {name: torch.randn(*size) * 0.1 for name, size in sizes.items()}
    if pickled:
        torch.save(tensors, directory / "pytorch_model.bin")
    else:
        save_file(tensors, directory / "model.safetensors")
    return tensors


EAGLE3_DRAFTED = 512


def save_eagle3(
    directory: Path,
    *,
    hidden_size: int = 64,
    head_dim: int = 32,
    num_taps: int = 3,
    of_vllm: bool = False,
    **changes: Any,
) -> dict[str, torch.Tensor]:
    """An EAGLE-3 head as published: fused layers, attention over embedding and feature, its own vocabulary.

    That of vLLM's tools has another name for its layer, and a config of its own for it. Norms that the config asks for
    are there.
    """
    directory.mkdir()
    layer = {
        **SHAPE,
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden_size,
        "head_dim": head_dim,
        "num_hidden_layers": 1,
    }
    config = {"transformer_layer_config": layer} if of_vllm else layer
    config = {**config, "draft_vocab_size": EAGLE3_DRAFTED, **changes}
    (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(3)
    q_size, kv_size, named = 4 * head_dim, 2 * head_dim, "layers.0" if of_vllm else "midlayer"
    sizes = {
        f"{named}.self_attn.q_proj.weight": (q_size, 2 * hidden_size),
        f"{named}.self_attn.k_proj.weight": (kv_size, 2 * hidden_size),
        f"{named}.self_attn.v_proj.weight": (kv_size, 2 * hidden_size),
        f"{named}.self_attn.o_proj.weight": (hidden_size, q_size),
        f"{named}.mlp.gate_proj.weight": (96, hidden_size),
        f"{named}.mlp.up_proj.weight": (96, hidden_size),
        f"{named}.mlp.down_proj.weight": (hidden_size, 96),
        f"{named}.hidden_norm.weight": (hidden_size,),
        f"{named}.input_layernorm.weight": (hidden_size,),
        f"{named}.post_attention_layernorm.weight": (hidden_size,),
        "norm.weight": (hidden_size,),
        "fc.weight": (hidden_size, num_taps * hidden_size),
        "lm_head.weight": (EAGLE3_DRAFTED, hidden_size),
    }
    if config.get("eagle_config", config).get("norm_before_fc"):
        sizes["input_norm.weight"] = (num_taps * hidden_size,)
    if changes.get("fc_norm"):
        sizes |= {f"fc_norm.{tap}.weight": (hidden_size,) for tap in range(num_taps)}
    tensors = {name: torch.randn(*size) * 0.3 for name, size in sizes.items()}
    drafted = torch.randperm(VOCAB)[:EAGLE3_DRAFTED].sort().values
    tensors["d2t"] = drafted - torch.arange(EAGLE3_DRAFTED)
    tensors["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, drafted, True)
    save_file(tensors, directory / "model.safetensors")
    return tensors
