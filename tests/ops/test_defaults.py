"""PyTorch's defaults are the caller's affair: no op takes its dtype or device from them."""

import pytest
import torch

from milonga.cli.selftest import cases, check


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.op)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_nothing(case, dtype):
    """Buffers are fp32 by name: of another dtype a kernel would fill a copy, and what is returned would be garbage."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        result = check(case, "cpu")
    finally:
        torch.set_default_dtype(before)
    assert result.passed, result
