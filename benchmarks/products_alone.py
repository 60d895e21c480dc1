"""The matrix products of a bundle by themselves, for what no graph over ONNX Runtime's kernels can be faster than."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import onnx

from benchmarks.row_cases import Case, clock_of
from flowspec_edge.core.limits import PREFILL_ROWS
from flowspec_edge.engine.graphs import load_graph
from flowspec_edge.manifest import load_manifest


class ProductsAlone:
    """The products of all layers and the head by themselves, each with rows of its own: what no graph over ONNX
    Runtime's kernels can be faster than.
    """

    def __init__(self, bundle: str, threads: int, cpu_time: bool) -> None:
        directory = Path(bundle)
        manifest = load_manifest(directory)
        self._clock = clock_of(cpu_time)
        *self._layers, self._head = (
            ProductGraph(directory / entry.file, threads) for entry in (*manifest.blocks, manifest.head)
        )

    def times(self, case: Case) -> list[float]:
        return [self._time(case) for _ in range(case["times"])]

    def _time(self, case: Case) -> float:
        num_rows = case.get("rows", PREFILL_ROWS)
        began = self._clock()
        for _ in range(1 if "rows" in case else -(-case["prompt"] // PREFILL_ROWS)):
            for layer in self._layers:
                layer.run(num_rows)
        self._head.run(case.get("rows", 1))
        return self._clock() - began


class ProductGraph:
    """The products of a graph's matrices, and nothing else of it."""

    def __init__(self, path: Path, threads: int) -> None:
        model = onnx.load(path)
        found = [node for node in model.graph.node if node.op_type in ("MatMulNBits", "MatMulInteger")]
        weights = {tensor.name: tensor for tensor in model.graph.initializer}
        inputs: dict[str, onnx.ValueInfoProto] = {}
        self._outputs = [node.output[0] for node in found]
        for node in found:
            is_bytes = node.op_type == "MatMulInteger"
            width = weights[node.input[1]].dims[0] if is_bytes else _attribute(node, "K")
            node.input[0] = f"rows.{width}.{is_bytes}"
            kind = onnx.TensorProto.UINT8 if is_bytes else onnx.TensorProto.FLOAT
            inputs[node.input[0]] = onnx.helper.make_tensor_value_info(node.input[0], kind, ["rows", width])
        results = [
            onnx.helper.make_tensor_value_info(
                node.output[0],
                onnx.TensorProto.INT32 if node.op_type == "MatMulInteger" else onnx.TensorProto.FLOAT,
                None,
            )
            for node in found
        ]
        used = [weights[name] for name in dict.fromkeys(name for node in found for name in node.input[1:]) if name]
        graph = onnx.helper.make_graph(found, "products", list(inputs.values()), results, used)
        del model.graph.initializer[:]
        alone = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
        with tempfile.TemporaryDirectory() as folder:
            onnx.save(alone, file := Path(folder) / "products.onnx")
            self._session = load_graph(file, threads)
        self._widths = {name: info.type.tensor_type for name, info in inputs.items()}

    def run(self, num_rows: int) -> None:
        self._session.run(self._outputs, self._rows(num_rows))

    @functools.cache  # noqa: B019 - lives as long as the process
    def _rows(self, num_rows: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng(0)
        found = {}
        for name, tensor in self._widths.items():
            size = num_rows, tensor.shape.dim[1].dim_value
            is_bytes = tensor.elem_type == onnx.TensorProto.UINT8
            found[name] = (
                random.integers(0, 256, size, np.uint8) if is_bytes else random.standard_normal(size, np.float32)
            )
        return found


def _attribute(node: onnx.NodeProto, name: str) -> int:
    return next(int(attribute.i) for attribute in node.attribute if attribute.name == name)
