"""Checkpoints of GPTQ and AWQ, packed as their own tools pack them, are read at their own bits; others are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="exporting needs torch: pip install '.[export]'")

import torch
from safetensors.torch import load_file, save_file
from transformers import Phi3Config

from exporter.bundle import ExportOptions, export_bundle
from exporter.model import load_checkpoint
from exporter.quantised import read_quantisation
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.errors import CheckpointError
from tests.arm import row_bits
from tests.exporter.checkpoints import edit_config, save_checkpoint

HIDDEN, INNER = 128, 192
SIZES: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 1}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Tensors = dict[str, torch.Tensor]


def pack(levels: torch.Tensor, bits: int, axis: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Levels side by side along an axis in words of int32, the first in the lowest bits: one loop, as the tools do."""
    per_word = 32 // bits
    given = levels.movedim(axis, 0).numpy().astype(np.uint32)
    words = np.zeros((len(given) // per_word, *given.shape[1:]), np.uint32)
    for word in range(len(words)):
        for place in range(per_word):
            words[word] |= given[word * per_word + (order or range(per_word))[place]] << np.uint32(bits * place)
    return torch.from_numpy(words.view(np.int32)).movedim(0, axis).contiguous()


def quantised(size: torch.Size, config: dict[str, Any], seed: int) -> tuple[Tensors, torch.Tensor]:
    """The tensors of a random matrix, and what they stand for by the published formula: [num_out, num_in]."""
    (num_out, num_in), bits, random = size, config["bits"], torch.Generator().manual_seed(seed)
    group = num_in if config["group_size"] == -1 else config["group_size"]
    num_groups, top = -(-num_in // group), 2**bits
    levels = torch.randint(0, top, (num_in, num_out), generator=random)
    zeros = torch.randint(0, top, (num_groups, num_out), generator=random)
    if config.get("sym"):
        zeros[:] = top // 2
    scales = ((torch.rand(num_groups, num_out, generator=random) + 0.5) * 0.2 / top).half()
    g_idx = torch.arange(num_in, dtype=torch.int32) // group
    weights = scales.float()[g_idx] * (levels - zeros[g_idx])
    if config["quant_method"] == "awq":
        return {
            "qweight": pack(levels, bits, 1, AWQ_ORDER),
            "qzeros": pack(zeros, bits, 1, AWQ_ORDER),
            "scales": scales,
        }, weights.T
    stored = zeros if config.get("checkpoint_format") == "gptq_v2" else (zeros - 1) % top
    tensors = {"qweight": pack(levels, bits, 0), "qzeros": pack(stored, bits, 1), "scales": scales, "g_idx": g_idx}
    return tensors, weights.T


def save_quantised(directory: Path, config: dict[str, Any], *args: Any, **changes: Any) -> dict[str, torch.Tensor]:
    """Save a checkpoint whose layers are quantised, and return what their matrices stand for."""
    save_checkpoint(directory, *args, dtype=torch.float16, **{**SIZES, **changes})
    edit_config(directory, quantization_config=config)
    path, expected, tensors = directory / "model.safetensors", {}, Tensors()
    for seed, (name, tensor) in enumerate(load_file(path).items()):
        if "_proj.weight" not in name:
            tensors[name] = tensor
            continue
        module = name.removesuffix(".weight")
        packed, expected[name] = quantised(tensor.shape, config, seed)
        tensors |= {f"{module}.{part}": value for part, value in packed.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return expected


GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": GPTQ,
    "gptq, zero points of its own": {**GPTQ, "sym": False, "checkpoint_format": "gptq", "group_size": 32},
    "gptq, rows as groups": {**GPTQ, "group_size": -1},
    "gptq, a shorter group at the end": {**GPTQ, "group_size": 128, "sym": False},
    "gptq, 8 bits": {**GPTQ, "bits": 8},
    "gptq_v2, 8 bits, zero points of its own": {**GPTQ, "bits": 8, "sym": False, "checkpoint_format": "gptq_v2"},
    "awq": AWQ,
}


@pytest.mark.parametrize("layout", CONFIGS)
def test_weights_have_the_bits_that_the_published_formula_gives(layout: str, tmp_path: Path) -> None:
    expected = save_quantised(tmp_path, CONFIGS[layout])
    checkpoint = load_checkpoint(tmp_path)
    found = checkpoint.layers(0, 1)
    for name, weights in expected.items():
        matrix = found[name.removeprefix("model.")]
        assert not isinstance(matrix, np.ndarray)
        np.testing.assert_array_equal(matrix.unpacked(), weights.numpy())
    assert len(expected) == 7
    assert any(f"{CONFIGS[layout]['bits']} bits in" in note for note in checkpoint.notes())


def test_fused_matrices_are_taken_apart(tmp_path: Path) -> None:
    expected = save_quantised(tmp_path, AWQ, Phi3Config, pad_token_id=0)
    found = load_checkpoint(tmp_path).layers(0, 1)["layers.0.mlp.up_proj.weight"]
    assert not isinstance(found, np.ndarray)
    fused = expected["model.layers.0.mlp.gate_up_proj.weight"]
    np.testing.assert_array_equal(found.unpacked(), fused[INNER:].numpy())


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["gptq, zero points of its own", "gptq, 8 bits", "awq"])
def test_a_bundle_has_the_checkpoints_own_precision_and_a_row_its_bits(layout: str, tmp_path: Path) -> None:
    save_quantised(tmp_path / "target", CONFIGS[layout])
    out = tmp_path / "out"
    manifest = export_bundle(ExportOptions(checkpoint=tmp_path / "target", drafter=None, out=out))
    assert manifest.precision == "own" and max(manifest.parity.block_errors) < 1e-4
    compared, differing = row_bits.compare(StageRunner(out, manifest, 0, 1), 2048, seed=1, num_prompt=200)
    assert compared > 100 and not differing


def test_a_bias_of_zeros_is_none(tmp_path: Path) -> None:
    save_quantised(tmp_path, GPTQ)
    name, path = "model.layers.0.mlp.up_proj.bias", tmp_path / "model.safetensors"
    save_file({**load_file(path), name: torch.zeros(INNER)}, path)
    assert "layers.0.mlp.up_proj.bias" not in load_checkpoint(tmp_path).layers(0, 1)
    save_file({**load_file(path), name: torch.ones(INNER)}, path)
    with pytest.raises(CheckpointError, match=f"tensor {name} has no place in the model"):
        load_checkpoint(tmp_path)


OTHERS = "bitsandbytes", "fp8", "compressed-tensors", "hqq", "quanto", "auto-round", "mxfp4", "torchao"
REFUSED: dict[str, dict[str, Any]] = {
    **{
        f"already quantised (quantization_config, {method}); of these GPTQ and AWQ are read": {"quant_method": method}
        for method in OTHERS
    },
    "already quantised (quantization_config, no method named)": {"load_in_4bit": True},
    "GPTQ of bits 3 is not supported, expected 4 or 8": {**GPTQ, "bits": 3},
    "AWQ of bits 8 is not supported, expected 4": {**AWQ, "bits": 8},
    "GPTQ of group_size 0, expected a positive integer or -1": {**GPTQ, "group_size": 0},
    "GPTQ of checkpoint_format 'marlin' is not supported, expected 'gptq' or 'gptq_v2'": {
        **GPTQ,
        "checkpoint_format": "marlin",
    },
    "GPTQ of dynamic {'-:lm_head': {}} is not supported": {**GPTQ, "dynamic": {"-:lm_head": {}}},
    "AWQ of version 'GEMV' is not supported, expected 'gemm'": {**AWQ, "version": "GEMV"},
    "AWQ of zero_point False is not supported": {**AWQ, "zero_point": False},
    "AWQ of backend 'llm-awq' is not supported": {**AWQ, "backend": "llm-awq"},
}


@pytest.mark.parametrize("text", REFUSED)
def test_other_methods_and_layouts_are_refused_by_name(text: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_quantisation(Path("model/config.json"), {"quantization_config": REFUSED[text]})
    assert text in str(caught.value) and str(caught.value).startswith("model/config.json: ")


def reorder(tensors: Tensors) -> None:
    """As act-order does: inputs in the order of their weight for the product, whatever group they are in."""
    g_idx = tensors["model.layers.0.self_attn.q_proj.g_idx"]
    tensors["model.layers.0.self_attn.q_proj.g_idx"] = g_idx.roll(1)


def shorten(tensors: Tensors) -> None:
    scales = tensors["model.layers.0.mlp.down_proj.scales"]
    tensors["model.layers.0.mlp.down_proj.scales"] = scales[1:].contiguous()


BROKEN: dict[str, Callable[[Tensors], object]] = {
    "self_attn.q_proj.g_idx has inputs in another order than that of their groups (act-order": reorder,
    "mlp.down_proj.scales has shape [2, 128], expected [3, 128] from config.json": shorten,
    "tensor model.layers.0.mlp.up_proj.qweight is missing": lambda tensors: tensors.pop(
        "model.layers.0.mlp.up_proj.qweight"
    ),
}


def test_tensors_of_another_layout_are_refused_by_name(tmp_path: Path) -> None:
    save_quantised(tmp_path, GPTQ)
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    for text, change in BROKEN.items():
        tensors = dict(whole)
        change(tensors)
        save_file(tensors, path)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(tmp_path)
        assert text in str(caught.value)
    save_file(whole, path)
    edit_config(tmp_path, quantization_config={**GPTQ, "group_size": 24})
    with pytest.raises(CheckpointError, match="inputs in GPTQ, 4 bits in groups of 24, expected whole words"):
        load_checkpoint(tmp_path)
