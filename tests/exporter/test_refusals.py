"""What cannot be exported is refused with one clear sentence, and nothing is left behind."""

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="exporting needs torch: pip install '.[export]'")

import torch
from safetensors.torch import load_file, save_file

from exporter.bundle import ExportOptions, export_bundle
from flowspec_edge.errors import BundleError, CheckpointError
from flowspec_edge.manifest import Manifest
from tests.exporter.checkpoints import edit_config, save_checkpoint, save_eagle, save_pickled

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in shards, to break copies of."""
    directory = tmp_path_factory.mktemp("saved") / "target"
    save_checkpoint(directory, max_shard_size="300KB")
    return directory


@pytest.fixture
def target(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "target")


def export(tmp_path: Path, drafter: Path | None = None, **options: Any) -> Manifest:
    return export_bundle(
        ExportOptions(checkpoint=tmp_path / "target", drafter=drafter, out=tmp_path / "out", **options)
    )


def shard_of(target: Path, tensor: str) -> Path:
    shards: dict[str, str] = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    return target / shards[tensor]


def truncate(path: Path, num_bytes: int = 5000) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def change_tensors(path: Path, **changes: Any) -> None:
    """Replace tensors of a file by what a function makes of them; None takes one out."""
    tensors = load_file(path)
    for name, change in changes.items():
        tensor = tensors.pop(name)
        if change is not None:
            tensors[name] = change(tensor)
    save_file(tensors, path, metadata={"format": "pt"})


DOWN = "model.layers.1.mlp.down_proj.weight"
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}

BROKEN: dict[str, Callable[[Path], object]] = {
    "config.json is missing": lambda target: (target / "config.json").unlink(),
    "config.json: not readable as JSON": lambda target: truncate(target / "config.json", 40),
    "architecture GPT2LMHeadModel is not supported; supported: LlamaForCausalLM, MistralForCausalLM, "
    "MinistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, Gemma2ForCausalLM": lambda target: edit_config(
        target, architectures=["GPT2LMHeadModel"]
    ),
    "hidden_act 'gelu' is not supported": lambda target: edit_config(target, hidden_act="gelu"),
    "already quantised (quantization_config, fp8)": lambda target: edit_config(
        target, quantization_config={"quant_method": "fp8"}
    ),
    "num_experts is 8, a field that is not known with LlamaForCausalLM": lambda target: edit_config(
        target, num_experts=8
    ),
    "hidden_size is None, expected a positive integer": lambda target: edit_config(target, "hidden_size"),
    "head_dim 24 is not a multiple of 16": lambda target: edit_config(target, head_dim=24),
    "rope type 'mrope' is not supported; supported: default, linear, dynamic, llama3, yarn, longrope": (
        lambda target: edit_config(target, rope_scaling={"type": "mrope", "factor": 4.0})
    ),
    "factor is None, expected a positive number": lambda target: edit_config(target, rope_scaling={"type": "linear"}),
    "original_max_position_embeddings is None": lambda target: edit_config(target, rope_scaling=ROPE),
    "high_freq_factor 4.0 is not above low_freq_factor 4.0": lambda target: edit_config(
        target, rope_scaling={**ROPE, "original_max_position_embeddings": 32}
    ),
    "lm_head.weight is missing and config.json does not set": lambda target: drop_from_index(target, "lm_head.weight"),
    "mlp.gate_proj.weight has shape [96, 64], expected [100, 64]": lambda target: edit_config(
        target, intermediate_size=100
    ),
    f"{DOWN} has shape [64, 95], expected [64, 96]": lambda target: change_tensors(
        shard_of(target, DOWN), **{DOWN: lambda tensor: tensor[:, 1:].contiguous()}
    ),
    f"{DOWN} is of type int8": lambda target: change_tensors(
        shard_of(target, DOWN), **{DOWN: lambda tensor: tensor.to(torch.int8)}
    ),
    f"{DOWN} is missing, though model.safetensors.index.json says": lambda target: change_tensors(
        shard_of(target, DOWN), **{DOWN: None}
    ),
    "not readable as safetensors": lambda target: truncate(shard_of(target, DOWN)),
    "which is missing; download the checkpoint again": lambda target: shard_of(target, DOWN).unlink(),
    "tensor model.layers.3.input_layernorm.weight is missing": lambda target: edit_config(target, num_hidden_layers=4),
    "tensor model.layers.2.input_layernorm.weight has no place": lambda target: edit_config(
        target, num_hidden_layers=2
    ),
    "self_attn.q_norm.weight is missing": lambda target: edit_config(
        target, architectures=["Qwen3ForCausalLM"], head_dim=16
    ),
    "tokenizer.json is missing, and so is tokenizer.model": lambda target: (target / "tokenizer.json").unlink(),
    "tokenizer.model: not readable as a SentencePiece model": lambda target: (target / "tokenizer.json").rename(
        target / "tokenizer.model"
    ),
    "tokenizer.json: not readable as a tokenizer": lambda target: (target / "tokenizer.json").write_text("{}"),
    "is outside the model's vocabulary of 1000": lambda target: edit_vocabulary(target, 1000),
}


def drop_from_index(target: Path, tensor: str) -> None:
    path = target / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][tensor]
    path.write_text(json.dumps(index))


def edit_vocabulary(target: Path, size: int) -> None:
    edit_config(target, vocab_size=size)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        change_tensors(shard_of(target, name), **{name: lambda tensor: tensor[:size].contiguous()})


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_checkpoint_is_refused_and_nothing_written(target: Path, tmp_path: Path, text: str) -> None:
    BROKEN[text](target)
    with pytest.raises(CheckpointError) as caught:
        export(tmp_path)
    assert text in str(caught.value)
    assert str(target) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


HEADS: dict[str, dict[str, Any]] = {
    "the drafter's hidden_size is 128, the target's is 64": {"hidden_size": 128},
    "the drafter's vocab_size is 1024, the target's is 2048": {"vocab_size": 1024},
    "tensor layers.0.mlp.gate_proj.weight has shape [96, 64], expected [80, 64]": {"intermediate_size": 80},
    "tensor layers.0.self_attn.q_proj.bias is missing": {"attention_bias": True},
}


@pytest.mark.parametrize("text", HEADS)
def test_a_head_for_another_model_is_refused(target: Path, tmp_path: Path, text: str) -> None:
    save_eagle(tmp_path / "eagle", **HEADS[text])
    with pytest.raises(CheckpointError) as caught:
        export(tmp_path, drafter=tmp_path / "eagle")
    assert text in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_pickled_weights_need_a_flag_and_may_hold_nothing_but_tensors(tmp_path: Path) -> None:
    save_pickled(tmp_path / "target", 2)
    with pytest.raises(CheckpointError, match="has only pickled weights.*--allow-pickle"):
        export(tmp_path)
    shard = tmp_path / "target/pytorch_model-00002-of-00002.bin"
    torch.save({"tensor": Unpickled()}, shard)
    with pytest.raises(CheckpointError, match="pytorch_model-00002-of-00002.bin: .* not readable as weights"):
        export(tmp_path, allow_pickle=True)
    assert not Unpickled.ran
    truncate(shard, 1000)
    with pytest.raises(CheckpointError, match="1000 bytes, not readable as weights"):
        export(tmp_path, allow_pickle=True)


class Unpickled:
    """Tells when it was built from a file."""

    ran = False

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[type[Any], str, bool]]:
        return (setattr, (Unpickled, "ran", True))


@pytest.mark.parametrize("limit_bytes", [60_000, 150_000, 300_000])
def test_a_full_disk_leaves_nothing_behind(target: Path, tmp_path: Path, limit_bytes: int) -> None:
    """A limit on the size of files makes a write fail in the middle, as a full disk does.

    The limits are reached in the tokenizer, in a graph and in the embedding.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        with pytest.raises(BundleError, match="out: could not be written"):
            export(tmp_path, precision="fp32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_where_it_writes(target: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="precision own is that of quantised models, as of GGUF files"):
        export(tmp_path, precision="own")
    (tmp_path / "out").mkdir()
    with pytest.raises(BundleError, match="exists already"):
        export(tmp_path)
    with pytest.raises(BundleError, match="is not a bundle"):
        export(tmp_path, force=True)
    (tmp_path / "out").rmdir()
    (tmp_path / "prose.txt").write_text("It was the best of times, it was the worst of times.\n" * 9)
    options: dict[str, Any] = {"precision": "fp32", "eval_text": tmp_path / "prose.txt"}
    export(tmp_path, **options)
    before = (tmp_path / "out/manifest.json").read_text()
    export(tmp_path, force=True, name="another", **options)
    assert (tmp_path / "out/manifest.json").read_text() != before
