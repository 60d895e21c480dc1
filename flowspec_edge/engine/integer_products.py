"""Whether this processor multiplies bytes exactly.

The precision w8a8 multiplies unsigned with signed bytes. x86 processors with AVX2 but without VNNI add two such products in 16
bits and cut what does not fit (instruction VPMADDUBSW, which ONNX Runtime uses there), so their sums would be wrong, silently.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from functools import cache

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from flowspec_edge.errors import BundleError

EXACT_PRECISION = "w8a8"

_GRAPH = base64.b64decode(
    "CAgSADpiChgKAWEKAWISAXkiDU1hdE11bEludGVnZXISAXBaFQoBYRIQCg4IAhIKCgMSAW0KAxIBa1oVCgFiEhAKDggDEgoKAxIBawoDEgFuYhUKAXkSEAoO"
    "CAYSCgoDEgFtCgMSAW5CBAoAEBI="
)
"""ONNX: y = MatMulInteger(a, b), a uint8 [m, k], b int8 [k, n], y int32 [m, n]."""

Bytes = NDArray[np.uint8]
SignedBytes = NDArray[np.int8]
Product = Callable[[Bytes, SignedBytes], NDArray[np.int32]]


def check_integer_products(product: Product | None = None) -> None:
    """Multiply the largest bytes there are, in shapes that vector kernels take.

    Raises:
        BundleError: the sums are wrong.
    """
    product = product or _product()
    for num_rows, num_terms, num_outputs in ((1, 64, 16), (2, 64, 32), (16, 256, 64)):
        largest = np.full((num_rows, num_terms), 255, np.uint8)
        weights = np.full((num_terms, num_outputs), 127, np.int8)
        weights[:, 1::2] = -127
        expected = np.where(np.arange(num_outputs) % 2, -1, 1) * (255 * 127 * num_terms)
        if not np.array_equal(product(largest, weights), np.broadcast_to(expected, (num_rows, num_outputs))):
            raise BundleError(
                f"this processor cuts sums of byte products (x86 without VNNI), so {EXACT_PRECISION} would be wrong on it; "
                "run another precision of the bundle: flowspec node --precision NAME"
            )


@cache
def _product() -> Product:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(_GRAPH, options, providers=["CPUExecutionProvider"])
    return lambda a, b: session.run(None, {"a": a, "b": b})[0]
