"""How the GPU kernels of `selective_scan` take their inputs: rows at even distances, copied only where they are not."""

from torch import Tensor

from milonga.ops.cpu_arrays import row_stride


def rows(tensor: Tensor | None, width: int) -> tuple[Tensor | None, int]:
    """`[..., width]` with evenly spaced rows, and the distance between them; no copy where it is so already."""
    if tensor is None:
        return None, width
    stride = row_stride(tensor)
    return (tensor.contiguous(), width) if stride is None else (tensor, stride)
