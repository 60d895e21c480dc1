"""The models of a soak: the demo model, or one as large as SmolLM2-135M, of random weights."""

import shutil
import subprocess
import sys
from pathlib import Path

from flowspec_edge.bundle import DEMO_BUNDLE, Bundle

SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "tie_word_embeddings": True,
}
"""Its shapes as published (config.json of HuggingFaceTB/SmolLM2-135M)."""
MODELS = ("demo", "135m")


def make_bundle(model: str, directory: Path) -> Bundle:
    """The bundle of one of MODELS; it is made in ``directory`` where it is not the demo model's."""
    if model == "demo":
        return Bundle.load(DEMO_BUNDLE)
    checkpoint, out = directory / "checkpoint", directory / "bundle"
    _save_random_weights(checkpoint)
    exporting = [sys.executable, "-m", "exporter", str(checkpoint), "--out", str(out), "--name", "random-135m"]
    subprocess.run([*exporting, "--block-size", "5"], check=True)  # in a process of its own, with torch
    shutil.rmtree(checkpoint)
    return Bundle.load(out)


def _save_random_weights(directory: Path) -> None:
    import torch  # takes seconds
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMOLLM2_135M)).save_pretrained(directory)
    shutil.copy(Path(__file__).parents[2] / "exporter/demo_model/target/tokenizer.json", directory)
