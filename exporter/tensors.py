"""The tensors of a checkpoint directory, which are read one by one and checked for shape and type.

Torch is imported where a file asks for it: numpy knows no bfloat16, and pickled files are torch's own.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open

from exporter.fields import read_json
from flowspec_edge.errors import CheckpointError

if TYPE_CHECKING:
    import torch

SAFE = "model.safetensors"
PICKLED = "pytorch_model.bin"
OF_NUMPY = ("F64", "F32", "F16", "I64", "I32", "I16", "I8", "U8", "BOOL")
"""Types of safetensors that numpy knows."""


class TensorFiles:
    """The tensors of one directory, in ``model.safetensors`` or its shards, with ``allow_pickle`` also in
    ``pytorch_model.bin``.

    Where there is a ``prefix``, those are meant whose names begin with it, and it is no part of their names here.

    Pickled files are read by torch's restricted unpickler (``weights_only``), and mapped from disk where their format
    allows it.
    """

    def __init__(self, directory: Path, prefix: str = "", *, allow_pickle: bool = False) -> None:
        self.directory, self._prefix = directory, prefix
        self._pickled: dict[Path, dict[str, torch.Tensor]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._types: dict[str, str] = {}  # as safetensors call them
        stored = self._locate(allow_pickle)
        self._file_of = {name.removeprefix(prefix): path for name, path in stored.items() if name.startswith(prefix)}

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def names(self) -> list[str]:
        return sorted(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that is there."""
        return self._shapes[self._prefix + name]

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise CheckpointError where the tensor is missing or of another shape. No values are read."""
        path = self._file_of.get(name)
        if path is None:
            raise CheckpointError(f"{self.directory}: tensor {name} is missing, expected shape {list(shape)}")
        found = self.shape(name)
        if found != shape:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {list(found)}, expected {list(shape)} from config.json"
            )

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """One tensor of weights in float32.

        Raises:
            CheckpointError: the tensor is missing, unreadable, of another shape, or not of floats.
        """
        found = self._read(name, shape)
        if not isinstance(found, np.ndarray) and found.is_floating_point():
            found = found.float().numpy()
        if not isinstance(found, np.ndarray) or found.dtype.kind != "f":
            raise CheckpointError(
                f"{self._file_of[name]}: tensor {name} is of type {found.dtype}; only float16, bfloat16 and float32 "
                "weights are read"
            )
        floats: np.ndarray = found.astype(np.float32, copy=False)
        return floats

    def read_integers(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """One table of whole numbers as int64. Raises CheckpointError as :meth:`read` does."""
        found = self._read(name, shape)
        if not isinstance(found, np.ndarray):
            found = found.float().numpy() if found.is_floating_point() else found.numpy()
        if found.dtype.kind not in "iub":
            raise CheckpointError(
                f"{self._file_of[name]}: tensor {name} is of type {found.dtype}, expected whole numbers"
            )
        integers: np.ndarray = found.astype(np.int64, copy=False)
        return integers

    def _read(self, name: str, shape: tuple[int, ...]) -> Any:
        """An array of numpy's, or of torch's where numpy does not know the type."""
        self.check(name, shape)
        path, stored = self._file_of[name], self._prefix + name
        if path in self._pickled:
            return self._pickled[path][stored]
        try:
            with _open_safetensors(path, "np" if self._types[stored] in OF_NUMPY else "pt") as file:
                return file.get_tensor(stored)
        except (SafetensorError, OSError) as cause:
            raise CheckpointError(
                f"{path}: tensor {name} is not readable ({cause}); download the file again"
            ) from cause

    def _locate(self, allow_pickle: bool) -> dict[str, Path]:
        for name in (SAFE, PICKLED):
            index, single = self.directory / f"{name}.index.json", self.directory / name
            if not index.is_file() and not single.is_file():
                continue
            if name == PICKLED and not allow_pickle:
                raise CheckpointError(
                    f"{self.directory}: has only pickled weights ({name}), which can carry programs; convert them to "
                    "safetensors, or pass --allow-pickle to read them with torch's weights_only"
                )
            files = _read_shard_names(index) if index.is_file() else {single: None}
            return {tensor: path for path, wanted in files.items() for tensor in self._present(path, index, wanted)}
        raise CheckpointError(f"{self.directory}: no {SAFE} or {SAFE}.index.json")

    def _present(self, path: Path, index: Path, wanted: set[str] | None) -> list[str]:
        """The names of a file's tensors. Raises CheckpointError where one that the index promises is not among them."""
        if path.name.endswith(".safetensors"):
            with _open_safetensors(path, "np") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
                self._types.update((name, part.get_dtype()) for name, part in slices.items())
        else:
            self._pickled[path] = _load_pickled(path)
            shapes = {name: tuple(tensor.shape) for name, tensor in self._pickled[path].items()}
        self._shapes.update(shapes)
        present = set(shapes)
        missing = sorted((wanted or set()) - present)
        if missing:
            raise CheckpointError(f"{path}: tensor {missing[0]} is missing, though {index.name} says it is here")
        return sorted(present if wanted is None else wanted)


def _read_shard_names(index: Path) -> dict[Path, set[str] | None]:
    """Which tensors an index promises in which file."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index}: has no weight_map; download the checkpoint again")
    shards: dict[Path, set[str] | None] = {}
    for shard in sorted(set(weight_map.values())):
        path = index.parent / shard
        if path.parent != index.parent or not path.is_file():
            raise CheckpointError(f"{index}: names {shard}, which is missing; download the checkpoint again")
        shards[path] = {name for name, owner in weight_map.items() if owner == shard}
    return shards


def _open_safetensors(path: Path, framework: str) -> Any:
    try:
        return safe_open(path, framework=framework)
    except (SafetensorError, OSError) as cause:
        raise CheckpointError(
            f"{path}: {path.stat().st_size} bytes, not readable as safetensors ({cause}); download it again"
        ) from cause


def _load_pickled(path: Path) -> dict[str, torch.Tensor]:
    import torch

    problem = ""
    for maps_file in (True, False):  # files in the format of torch before 1.6 cannot be mapped
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=maps_file)
        except pickle.UnpicklingError:
            problem = "it holds other things than tensors, or is no torch file"
        except Exception as cause:  # torch.load raises half a dozen unrelated types for a damaged file
            problem = " ".join(str(cause).split())[:300]
        else:
            if isinstance(found, dict) and all(isinstance(value, torch.Tensor) for value in found.values()):
                return found
            problem = "it holds other things than named tensors"
    raise CheckpointError(f"{path}: {path.stat().st_size} bytes, not readable as weights ({problem})")
