"""w8a8 is exact, or refused where it would not be."""

import numpy as np
import pytest

from flowspec_edge.engine.integer_products import WEIGHTS, ZERO_POINT, _product, check_integer_products
from flowspec_edge.errors import BundleError


def exact(a):
    return (a.astype(np.int32) - ZERO_POINT) @ WEIGHTS.astype(np.int32)


def saturating(a):
    """VPMADDUBSW: pairs of products are added in 16 bits."""
    products = a[:, :, None].astype(np.int32) * WEIGHTS[None].astype(np.int32)  # [rows, terms, outputs]
    pairs = (products[:, ::2] + products[:, 1::2]).clip(-(2**15), 2**15 - 1)
    return pairs.sum(axis=1) - ZERO_POINT * WEIGHTS.sum(axis=0, dtype=np.int32)


def test_a_processor_that_saturates_is_refused():
    with pytest.raises(BundleError, match="cuts sums of byte products.*--precision NAME"):
        check_integer_products(saturating)


def test_exact_products_pass():
    check_integer_products(exact)


def test_onnx_runtime_is_exact_here():
    """Also where the processor has no instruction for it."""
    check_integer_products()
    a = np.random.default_rng(0).integers(0, 256, (3, len(WEIGHTS)), np.uint8)
    np.testing.assert_array_equal(_product()(a), exact(a))
