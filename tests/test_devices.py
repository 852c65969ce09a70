"""The machine's float32 products: faster where that costs no precision, and as they were afterwards."""

import pytest
import torch

from octavo.devices import whole_processor


def test_products_stay_float32_and_the_switch_goes_back() -> None:
    """Float32 keeps a product of 512 terms within 1e-6 of the exact one; bfloat16 would miss by 1e-3."""
    a, b = torch.randn(2, 64, 512, generator=torch.Generator().manual_seed(1)).unbind()
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(ZeroDivisionError), whole_processor():
        inside = torch.nn.functional.linear(a, b)
        exact = a.double() @ b.double().t()
        assert (inside - exact).norm() < 1e-6 * exact.norm()
        raise ZeroDivisionError
    assert torch.backends.mkldnn.matmul.fp32_precision == before
