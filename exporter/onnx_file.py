"""Builds ONNX graphs node by node, and writes them to one file with their weights streamed behind them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from flowspec_edge.errors import CheckpointError

OPSET = 21
"""The first in which DequantizeLinear knows blocks."""
IR_VERSION = 10
"""That of opset 21."""
RUNTIME_DOMAIN = "com.microsoft"
RUNTIME_OPERATORS = ("RotaryEmbedding", "FusedMatMul", "MatMulNBits", "GroupQueryAttention")
MAX_FILE_BYTES = 2**31 - 2**24
"""A protobuf file ends at 2 GiB.

A larger graph needs further files for its weights, which a bundle does not describe.
"""
SESSION_BYTES = 70_000
"""What a session takes that runs a single operator (x86, onnxruntime 1.32; ``python -m benchmarks.memory``)."""
OPERATOR_BYTES = 5_000
"""What a session takes for each operator that it runs, however small; measured likewise."""
_MODEL_GRAPH, _GRAPH_INITIALIZER, _TENSOR_RAW_DATA = 7, 5, 9
"""Numbers of fields in onnx.proto."""

Size = int | str
"""Of one axis: a number, or the name of one that differs from run to run."""


@dataclass(frozen=True)
class Tensor:
    """Weights of a type of ONNX's, which are made piece by piece when they are written."""

    shape: tuple[int, ...]
    kind: int
    num_bytes: int
    pieces: Callable[[], Iterable[np.ndarray]]


class Writer:
    """Nodes, small constants and large tensors so far. The names of tensors begin with ``name``.

    All others are numbers from ``first_number`` on. ONNX Runtime keeps about ten copies of a name, and of one with more
    than 15 characters each takes memory of its own: names that tell a place in the model made a loaded layer 80 KB
    larger.
    """

    def __init__(self, name: str = "", first_number: int = 0) -> None:
        self.name = name
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.tensors: dict[str, Tensor] = {}
        self._prepared: dict[tuple[str, str], str] = {}
        self._named: dict[bytes, str] = {}  # constants by what they are
        self._numbers = itertools.count(first_number)

    def within(self, name: str) -> Writer:
        """A writer of the same graph whose names begin with ``name`` below this one's."""
        inner = Writer(f"{self.name}/{name}")
        inner.nodes, inner.constants, inner.tensors = self.nodes, self.constants, self.tensors
        inner._prepared, inner._named, inner._numbers = self._prepared, self._named, self._numbers
        return inner

    def subgraph(self) -> Writer:
        """A writer of a graph inside this one, which may use this one's values."""
        inner = Writer()
        inner._numbers = self._numbers
        return inner

    def new_name(self) -> str:
        return f"_{next(self._numbers)}"

    def constant(self, value: Any, dtype: Any = None) -> str:
        """The name of a constant, the same for equal ones.

        It is of ``dtype``, else int64, or float32 where it has a decimal point.
        """
        array = np.asarray(value)
        array = array.astype(dtype or (np.float32 if array.dtype.kind == "f" else np.int64))
        what = numpy_helper.from_array(array).SerializeToString()
        if what not in self._named:
            self._named[what] = self.new_name()
            self.constants.append(numpy_helper.from_array(array, self._named[what]))
        return self._named[what]

    def tensor(self, name: str, array: np.ndarray, kind: int | None = None) -> str:
        """The name of weights. ``kind`` is their type in ONNX where numpy has no such type."""
        name = f"{self.name}/{name}"
        kind = helper.np_dtype_to_tensor_dtype(array.dtype) if kind is None else kind
        array = np.ascontiguousarray(array)
        self.tensors[name] = Tensor(array.shape, kind, array.nbytes, lambda: (array,))
        return name

    def made_tensor(
        self, name: str, shape: tuple[int, ...], dtype: Any, pieces: Callable[[], Iterable[np.ndarray]]
    ) -> str:
        """The name of weights that are not here yet: ``pieces`` makes them, in order, when the graph is written."""
        name, dtype = f"{self.name}/{name}", np.dtype(dtype)
        kind = helper.np_dtype_to_tensor_dtype(dtype)
        self.tensors[name] = Tensor(shape, kind, math.prod(shape) * dtype.itemsize, pieces)
        return name

    def add(self, op_type: str, *inputs: str, outputs: tuple[str, ...] = (), **attributes: Any) -> str:
        """Add a node, and return its first output's name."""
        name = self.new_name()
        domain = RUNTIME_DOMAIN if op_type in RUNTIME_OPERATORS else ""
        self.nodes.append(helper.make_node(op_type, inputs, outputs or (name,), name=name, domain=domain, **attributes))
        return outputs[0] if outputs else name

    def num_operators(self, first: int = 0) -> int:
        """The nodes from number ``first`` on that run with each forward: what is of tensors alone runs at loading."""
        return sum(1 for node in self.nodes[first:] if not self.tensors.keys() >= set(node.input))

    def loaded_bytes(self) -> int:
        """What a session takes beside the tensors once it has loaded the graph."""
        return SESSION_BYTES + self.num_operators() * OPERATOR_BYTES

    def prepared(self, what: str, rows: str, prepare: Callable[[], str]) -> str:
        """What ``prepare`` adds and names for the rows ``rows``; it is asked once, however many products need it."""
        if (what, rows) not in self._prepared:
            self._prepared[what, rows] = prepare()
        return self._prepared[what, rows]

    def reshape(self, name: str, *sizes: int) -> str:
        return self.add("Reshape", name, self.constant(sizes))

    def size(self, name: str, axis: int) -> str:
        """The size of one axis, int64 [1]."""
        return self.add("Shape", name, start=axis, end=axis + 1)

    def sizes(self, *parts: str | int) -> str:
        """A shape of sizes that are known and names of those that are not."""
        named = [part if isinstance(part, str) else self.constant([part]) for part in parts]
        return self.add("Concat", *named, axis=0)

    def model(self, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]) -> onnx.ModelProto:
        """The graph without its large tensors."""
        graph = helper.make_graph(self.nodes, "graph", inputs, outputs, self.constants)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(RUNTIME_DOMAIN, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)

    def save(self, path: Path, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]) -> None:
        """Write the graph to ``path``. Raises CheckpointError where the weights do not fit into one file."""
        save_model(self.model(inputs, outputs), self.tensors, path)


def floats(name: str, *sizes: Size) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)


def integers(name: str, *sizes: Size) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.INT64, sizes)


def save_model(model: onnx.ModelProto, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a model whose graph gets ``tensors`` beside its own initializers.

    They are written piece by piece: protobuf would have all of them in memory, twice.

    Raises:
        CheckpointError: they do not fit into one file.
    """
    heads = {name: _tensor_head(name, tensor) for name, tensor in tensors.items()}
    own = model.graph.SerializeToString()
    graph_bytes = len(own) + sum(len(heads[name]) + tensor.num_bytes for name, tensor in tensors.items())
    check_size(path, graph_bytes)
    around = onnx.ModelProto()
    around.CopyFrom(model)
    around.ClearField("graph")
    with path.open("wb") as file:
        file.write(around.SerializeToString() + _field_head(_MODEL_GRAPH, graph_bytes) + own)
        for name, tensor in tensors.items():
            file.write(heads[name])
            for piece in tensor.pieces():
                file.write(as_bytes(piece))


def as_bytes(array: np.ndarray) -> memoryview:
    """The bytes of an array in order, to be written to a file: ``tofile`` says nothing where a disk is full."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def check_size(path: Path, num_bytes: int) -> None:
    """Raise CheckpointError where a graph with weights of ``num_bytes`` does not fit into one file."""
    if num_bytes > MAX_FILE_BYTES:
        raise CheckpointError(
            f"{path.name}: {num_bytes} bytes of weights exceed the {MAX_FILE_BYTES}-byte limit of one ONNX file; "
            "choose a smaller precision, or lower --block-size"
        )


def _tensor_head(name: str, tensor: Tensor) -> bytes:
    """What stands before the bytes of an initializer in a graph."""
    head: bytes = TensorProto(name=name, dims=tensor.shape, data_type=tensor.kind).SerializeToString()
    head += _field_head(_TENSOR_RAW_DATA, tensor.num_bytes)
    return _field_head(_GRAPH_INITIALIZER, len(head) + tensor.num_bytes) + head


def _field_head(number: int, num_bytes: int) -> bytes:
    """The head of a field of ``num_bytes``, as protobuf writes it: number and wire type, then the length in 7 bits."""
    head = [number << 3 | 2]
    while num_bytes > 127:
        head.append(num_bytes & 127 | 128)
        num_bytes >>= 7
    return bytes([*head, num_bytes])
