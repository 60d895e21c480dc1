"""w8a8 is refused where the processor would compute it wrongly."""

import numpy as np
import pytest

from flowspec_edge.engine.integer_products import _product, check_integer_products
from flowspec_edge.errors import BundleError


def saturating(a, b):
    """VPMADDUBSW: pairs of products are added in 16 bits."""
    products = a[:, :, None].astype(np.int32) * b[None].astype(np.int32)  # [m, k, n]
    pairs = (products[:, ::2] + products[:, 1::2]).clip(-(2**15), 2**15 - 1)
    return pairs.sum(axis=1)


def test_a_processor_that_saturates_is_refused():
    with pytest.raises(BundleError, match="cuts sums of byte products.*--precision NAME"):
        check_integer_products(saturating)


def test_exact_products_pass():
    check_integer_products(lambda a, b: a.astype(np.int32) @ b.astype(np.int32))


def test_the_probe_is_onnx_runtimes_own_product():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 128, (3, 64), np.uint8), rng.integers(-64, 64, (64, 32), np.int8)  # too small to saturate
    np.testing.assert_array_equal(_product()(a, b), a.astype(np.int32) @ b.astype(np.int32))
