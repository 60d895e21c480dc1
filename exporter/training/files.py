"""Reads targets and heads from disk into torch modules, and writes them in their published layouts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from exporter.config import LayerShape
from exporter.source import Source
from exporter.training.network import DraftHead, Target
from exporter.training.shapes import theta_of
from flowspec_edge.errors import TrainingError

PAD_TOKEN = 1
DRAFTED = "d2t"
"""The tensor with the difference between each drafted token's id and its place among them, as EAGLE-3 heads have it."""


def open_source(path: Path) -> Source:
    """The checkpoint in a directory, or the model in a GGUF file. Raises CheckpointError where it cannot be read."""
    if path.is_file():
        from exporter.gguf.model import open_gguf

        return open_gguf(path)
    from exporter.model import load_checkpoint

    return load_checkpoint(path)


def read_target(source: Source) -> Target:
    """The whole model in float32, not to be trained."""
    geometry = source.geometry
    with torch.device("meta"):
        target = Target(source.layer_shape, geometry.num_layers, geometry.vocab_size, is_tied=source.is_tied)
    weights = {
        "embed_tokens.weight": torch.from_numpy(np.concatenate([*source.embedding()]).astype(np.float32)),
        "norm.weight": torch.from_numpy(np.asarray(source.final_norm())),
    }
    if not source.is_tied:
        weights["lm_head.weight"] = torch.from_numpy(source.lm_head().unpacked())
    for layer in range(geometry.num_layers):
        for name, weight in source.layers(layer, layer + 1).items():
            floats = weight if isinstance(weight, np.ndarray) else weight.unpacked()
            weights[name.replace("layers.0", f"layers.{layer}", 1)] = torch.from_numpy(floats)
    target.load_state_dict(weights, assign=True)
    return target.requires_grad_(False)


def save_target(target: Target, directory: Path, tokenizer: Path) -> None:
    """Write a ``LlamaForCausalLM`` directory: float16 safetensors, config, tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    config = configuration(
        target.shape,
        len(target.output_matrix),
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=len(target.layers),
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=PAD_TOKEN,
    )
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (tokenizer.parent / name).exists():
            shutil.copyfile(tokenizer.parent / name, directory / name)
    save_file(halved(target, "model."), directory / "model.safetensors", metadata={"format": "pt"})


def save_head(head: DraftHead, directory: Path, vocab_size: int, **more: Any) -> None:
    """Write an EAGLE-1 directory in the published layout: float16 safetensors and config.

    Where the head drafts a part of the vocabulary, ``draft_vocab_size`` and ``d2t`` say which, as in EAGLE-3.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = halved(head)
    if head.tokens is not None:
        tensors[DRAFTED] = head.tokens.cpu() - torch.arange(len(head.tokens))
        more = {"draft_vocab_size": len(head.tokens), **more}
    config = configuration(
        head.shape,
        vocab_size,
        architectures=["EagleLlamaForCausalLM"],
        num_hidden_layers=1,
        bias=True,
        eagle={
            "version": 1,
            "fc_input": "concat(embed(token_{i+1}), hidden_i post-final-norm)",
            "rope_position": "i",
            "layer0_input_layernorm": False,
            "final_norm": False,
            "embed": "target embed_tokens",
            "lm_head": "target lm_head",
        },
        **more,
    )
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=1))


def configuration(shape: LayerShape, vocab_size: int, **more: Any) -> dict[str, Any]:
    """A plain Llama's ``shape`` as the fields of a Hugging Face ``config.json``, with further fields ``more``."""
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_context,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": theta_of(shape),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        **more,
    }


def halved(module: nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    return {prefix + name: value.detach().cpu().half().contiguous() for name, value in module.state_dict().items()}


def load_head(directory: Path, shape: LayerShape) -> DraftHead:
    """A head saved by ``save_head``, of this ``shape``, in float32.

    Raises:
        TrainingError: the directory does not hold one.
    """
    path = directory / "model.safetensors"
    try:
        tensors = load_file(path)
        drafted = tensors.pop(DRAFTED, None)
        head = DraftHead(shape, None if drafted is None else drafted + torch.arange(len(drafted)))
        head.load_state_dict({name: value.float() for name, value in tensors.items()})
    except (OSError, SafetensorError, RuntimeError) as cause:  # RuntimeError: a tensor is missing or misshapen
        raise TrainingError(f"{path}: does not hold a head for this model ({cause})") from cause
    return head
