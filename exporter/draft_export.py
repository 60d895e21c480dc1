"""Writes an EAGLE-3 head in the bundle's own precision, by optimum's export, and compares it with torch."""

from __future__ import annotations

import dataclasses
import shutil
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from exporter.eagle3 import DraftTop, Eagle3Head
from exporter.onnx_export import GraphSpec, drafter_spec, export_graph, fuse_spec, top_spec
from exporter.parity import ChainCheck
from exporter.precisions import Precision
from exporter.rewriting import rewrite_matrices
from exporter.torch_reference import TorchDrafter
from flowspec_edge.manifest import HIDDEN_OUT, TOP_LOG_PROBS, DrafterEntry, FileEntry, describe_file

SCRATCH = "scratch"
"""Directory of the float32 graph from which a precision's file is made. It is deleted at the end."""


class DraftExport:
    """A head read from disk, and how it is written."""

    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "optimum", "optimum-onnx")

    def __init__(self, head: Eagle3Head) -> None:
        self._head = head

    @property
    def taps(self) -> tuple[int, ...]:
        return self._head.taps

    def write(self, directory: Path, precision: Precision, check: ChainCheck) -> tuple[DrafterEntry, float]:
        """Write the files of the head to a bundle's ``directory``; return their entry, and the largest error.

        It is in the precision that draft heads have beside such a model.

        Raises:
            ParityError: a graph differs from torch by more than the precision's tolerance for drafters.
        """
        precision = precision.of_drafters
        return _write(self._head, _Export(directory, precision), check)


def _write(draft_head: Eagle3Head, export: _Export, check: ChainCheck) -> tuple[DrafterEntry, float]:
    drafter, fuse, top = draft_head.build(), draft_head.build_fuse(), draft_head.build_top()
    path = export.write(drafter, drafter_spec(drafter.shape), "drafter.onnx")
    errors = [check.check_drafter(TorchDrafter(drafter, check.capacity), drafter.shape, path)]
    fuse_path = export.write(fuse, fuse_spec(fuse), "fuse.onnx")

    def fused(rows: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            result: np.ndarray = fuse(torch.from_numpy(rows))[HIDDEN_OUT].numpy()
        return result

    errors.append(check.check_fuse(fused, fuse_path, len(draft_head.taps)))
    top_path = export.write(top, top_spec(top), "draft_top.onnx")
    errors.append(check.check_top(partial(_log_probs_of, top), top_path, top.lm_head.out_features))
    shape = draft_head.shape
    entry = DrafterEntry(
        **dataclasses.asdict(export.entry(path)),
        memory_bytes=export.memory_bytes,
        kind=draft_head.kind,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        rope_frequencies=list(shape.rope_frequencies),
        taps=list(draft_head.taps),
        fuse=export.entry(fuse_path),
        top=export.entry(top_path),
    )
    return entry, max(errors)


def _log_probs_of(top: DraftTop, rows: np.ndarray, k: int) -> np.ndarray:
    with torch.no_grad():
        result: np.ndarray = top(torch.from_numpy(rows), torch.tensor([k]))[TOP_LOG_PROBS].numpy()
    return result


class _Export:
    def __init__(self, directory: Path, precision: Precision) -> None:
        self._directory, self._precision = directory, precision
        self.memory_bytes = 0
        """What all files take that were written, once they are loaded."""

    def write(self, module: nn.Module, spec: GraphSpec, name: str) -> Path:
        """Export a graph, and give ``module`` the weights that the file now stands for.

        Weights of a large float32 graph are in further files beside it.
        """
        scratch = self._directory / SCRATCH
        scratch.mkdir(exist_ok=True)
        float32, path = scratch / name, self._directory / name
        export_graph(module, spec, float32)
        weights, memory_bytes = rewrite_matrices(float32, path, self._precision)
        self.memory_bytes += memory_bytes
        shutil.rmtree(scratch)
        found = {name: torch.from_numpy(weight) for name, weight in weights.items()}
        unexpected = module.load_state_dict(found, strict=False, assign=True).unexpected_keys
        assert not unexpected, unexpected
        return path

    def entry(self, path: Path) -> FileEntry:
        return FileEntry(**describe_file(self._directory, path.name))
