"""w8a8 is exact, or refused where it would not be."""

import numpy as np
import pytest

from flowspec_edge.engine.integer_products import WEIGHTS, ZERO_POINT, _product, check_integer_products
from flowspec_edge.errors import BundleError


def exact(a: np.ndarray) -> np.ndarray:
    product: np.ndarray = (a.astype(np.int32) - ZERO_POINT) @ WEIGHTS.astype(np.int32)
    return product


def saturating(a: np.ndarray) -> np.ndarray:
    """VPMADDUBSW: pairs of products are added in 16 bits."""
    products = a[:, :, None].astype(np.int32) * WEIGHTS[None].astype(np.int32)  # [rows, terms, outputs]
    pairs = (products[:, ::2] + products[:, 1::2]).clip(-(2**15), 2**15 - 1)
    sums: np.ndarray = pairs.sum(axis=1) - ZERO_POINT * WEIGHTS.sum(axis=0, dtype=np.int32)
    return sums


def test_a_processor_that_saturates_is_refused() -> None:
    with pytest.raises(BundleError, match="cuts sums of byte products.*--precision NAME"):
        check_integer_products(saturating)


def test_exact_products_pass() -> None:
    check_integer_products(exact)


def test_onnx_runtime_is_exact_here() -> None:
    """Also where the processor has no instruction for it."""
    check_integer_products()
    a = np.random.default_rng(0).integers(0, 256, (3, len(WEIGHTS)), np.uint8)
    np.testing.assert_array_equal(_product()(a), exact(a))
