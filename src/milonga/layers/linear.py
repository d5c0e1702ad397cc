"""The linear map of every layer: PyTorch's module with this library's product."""

from jaxtyping import Float
from torch import Tensor, nn

from milonga.ops.linear import linear


class Linear(nn.Linear):
    """`x @ weight^T`, no bias; weight `[F, D]` with PyTorch's default initialisation."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out, bias=False)

    def forward(self, input: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows F"]:
        """-> the product, dtype of the input (of autocast where that is on)."""
        return linear(input, self.weight)
