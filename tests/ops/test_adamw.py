"""`adamw_` refuses what its kernels cannot follow. What they compute: `interpreted_adamw.py`, and on a GPU."""

import pytest
import torch

from milonga.ops.adamw import Table, adamw_, takes


def columns(device: str, dtype: torch.dtype = torch.float32) -> tuple[list[torch.Tensor], ...]:
    whole = [[torch.zeros(5, device=device, dtype=dtype)] for _ in range(4)]
    return *whole, [torch.zeros((), device=device)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_elsewhere_are_refused_with_what_to_do(dtype: torch.dtype) -> None:
    tensors = columns("cpu", dtype)
    assert not takes(tensors)
    with pytest.raises(ValueError, match=r"adamw_: tensors must be .* on one GPU.* torch.optim.AdamW"):
        adamw_(tensors, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def test_a_table_follows_tensors_to_another_device() -> None:
    """The map of chunks, which depends on sizes, lies where the tensors lie."""
    table = Table()
    for device in ("cpu", "meta", "cpu"):
        (launch,) = table.launches(columns(device), [5], 2)
        assert launch.rows.device.type == launch.owner.device.type == device
        if device == "cpu":
            assert launch.owner.tolist() == [0, 0, 0]
