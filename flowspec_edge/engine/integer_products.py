"""Checks that this processor multiplies bytes exactly.

The precision w8a8 multiplies unsigned with signed bytes. x86 processors with AVX2 but without VNNI have an instruction
that adds two such products in 16 bits and cuts what does not fit (VPMADDUBSW). ONNX Runtime uses it there unless it is
told to be exact (manifest.EXACT_SUMS). If a processor or a version of ONNX Runtime were wrong all the same, nothing
else would report it.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable
from functools import cache

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from flowspec_edge.errors import BundleError
from flowspec_edge.manifest import SESSION_SETTINGS

EXACT_PRECISION = "w8a8"
ZERO_POINT = 128

_GRAPH = zlib.decompress(
    base64.b64decode(
        "eNrt3LEJwlAUQNG8H5Hvg2h86AJi5QhWkk4hC9hIAkEETYLEIjZ+F3BhGwsbN7C5nO4Ocb23aP0OokuVQqVUvVfX5tA2p7oz6RdJXnT57bytu+pY"
        "XU3a1SuID85v0jiTcheCPJ4AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAODfVtPUZT/bgJ2E/VylsFTH3plqbHLR2AdXzlR6m2jihzb6Zuc32UCj1D5g"
        "xB5B"
    )
)
"""The ONNX graph y = MatMulInteger(a, WEIGHTS, ZERO_POINT) with a uint8 [rows, terms] and y int32 [rows, outputs]. Each
layer in w8a8 has such products.
"""

WEIGHTS = np.full((256, 64), 127, np.int8)  # [terms, outputs]
WEIGHTS[:, 1::2] = -127

Product = Callable[[NDArray[np.uint8]], NDArray[np.int32]]


def check_integer_products(product: Product | None = None) -> None:
    """Multiply the largest bytes that there are, for numbers of rows for which kernels differ.

    ``product`` subtracts the zero point from rows, uint8 [rows, 256], and multiplies them by :data:`WEIGHTS`. By
    default ONNX Runtime does so.

    Raises:
        BundleError: the sums are wrong.
    """
    product = product or _product()
    num_terms = len(WEIGHTS)
    for num_rows in (1, 2, 16):
        largest = np.full((num_rows, num_terms), 255, np.uint8)
        expected = np.tile(WEIGHTS[0].astype(np.int32) * (255 - ZERO_POINT) * num_terms, (num_rows, 1))
        if not np.array_equal(product(largest), expected):
            raise BundleError(
                f"this processor cuts sums of byte products, so {EXACT_PRECISION} would be wrong on it with "
                f"onnxruntime {ort.__version__}; run another precision of the bundle: flowspec node --precision NAME"
            )


@cache
def _product() -> Product:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    for setting in SESSION_SETTINGS:
        options.add_session_config_entry(*setting)
    session = ort.InferenceSession(_GRAPH, options, providers=["CPUExecutionProvider"])
    return lambda a: session.run(None, {"a": a})[0]
