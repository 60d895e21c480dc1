"""A checkpoint and the GGUF file of the same model become the same graphs, byte for byte."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="exporting checkpoints needs torch: pip install '.[export]'")

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from exporter.bundle import ExportOptions, export_bundle
from exporter.model import load_checkpoint
from tests.exporter.checkpoints import LLAMA3_ROPE, save_checkpoint
from tests.exporter.gguf.conftest import write_gguf
from tests.exporter.gguf.models import fields, tensors_of

pytestmark = pytest.mark.slow

KINDS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FAMILIES: dict[str, tuple[str, type[Any], dict[str, Any]]] = {
    "Llama": ("llama", LlamaConfig, {}),
    "Llama 3.1": ("llama", LlamaConfig, {"rope_scaling": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "Llama with biases": ("llama", LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "Mistral": ("llama", MistralConfig, {"sliding_window": None, "head_dim": 32}),
    "Qwen2": ("qwen2", Qwen2Config, {}),
    "Qwen3": ("qwen3", Qwen3Config, {"head_dim": 48}),
}


@pytest.mark.parametrize(
    ("family", "kind"), [*((family, "F32") for family in FAMILIES), ("Llama", "F16"), ("Qwen2", "BF16")]
)
def test_a_gguf_file_gives_the_graphs_of_its_checkpoint(family: str, kind: str, tmp_path: Path) -> None:
    architecture, config_class, changes = FAMILIES[family]
    save_checkpoint(tmp_path / "target", config_class, num_hidden_layers=2, dtype=KINDS[kind], **changes)
    checkpoint = load_checkpoint(tmp_path / "target")
    shape, is_llama = checkpoint.layer_shape, architecture == "llama"
    weights = {
        name: weight.float().numpy() for name, weight in load_file(tmp_path / "target/model.safetensors").items()
    }
    tensors = tensors_of(weights, kind, (shape.num_heads, shape.num_kv_heads) if is_llama else None)
    if "rope_scaling" in changes:  # llama.cpp's converter stores what frequencies are divided by
        plain = 10000.0 ** -(torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
        tensors["rope_freqs.weight"] = "F32", (plain / torch.tensor(shape.rope_frequencies)).numpy()
    path = write_gguf(tmp_path / "model.gguf", fields(shape, 2, architecture), tensors, architecture)
    options: dict[str, Any] = {"drafter": None, "block_size": 2 if family == "Qwen3" else 1}
    expected = export_bundle(
        ExportOptions(checkpoint=tmp_path / "target", out=tmp_path / "expected", precision="fp32", **options)
    )
    found = export_bundle(ExportOptions(checkpoint=path, out=tmp_path / "found", **options))
    for one, other in zip(found.files(), expected.files(), strict=True):
        if one.file != "tokenizer.json":
            assert one == other
    ours, theirs = found.geometry, expected.geometry
    assert ours.rope_frequencies == pytest.approx(theirs.rope_frequencies, rel=1e-6)
    assert (ours.num_layers, ours.max_context, ours.vocab_size) == (2, theirs.max_context, theirs.vocab_size)
    assert (found.architecture == expected.architecture) == (family != "Mistral"), "whose files say llama"
