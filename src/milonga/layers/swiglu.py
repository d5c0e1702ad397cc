"""The gated MLP. It looks at one step at a time, so its state is empty."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor, nn

from milonga.layers.base import Keep, Layer, LayerConfig
from milonga.layers.linear import Linear
from milonga.layers.norm import norm_of
from milonga.layers.recompute import cheap
from milonga.ops.decode_step import has_step_kernels, swiglu_step
from milonga.ops.mamba_piece import has_piece_kernels
from milonga.ops.swiglu import swiglu
from milonga.segments import Segments


class SwiGLUConfig(LayerConfig):
    """`down(silu(gate x) * up x)` with hidden width `d_hidden`, no biases.

    With `d_hidden = 2 * d_model` it has the size of a Mamba layer and stands in for one (MLP2-SWA-MLP).
    """

    kind: Literal["swiglu"] = "swiglu"
    d_hidden: PositiveInt

    def build(self, d_model: int) -> "SwiGLU":
        """As `LayerConfig.build`."""
        return SwiGLU(d_model, self.d_hidden)

    def parameter_count(self, d_model: int) -> int:
        """As `LayerConfig.parameter_count`."""
        return 3 * d_model * self.d_hidden

    def flops_per_token(self, d_model: int, context: float) -> float:
        """As `LayerConfig.flops_per_token`: the products and 5 operations a hidden unit for the gate."""
        return 6.0 * d_model * self.d_hidden + 5.0 * self.d_hidden

    def state_bytes(self, d_model: int, length: int, dtype: torch.dtype) -> int:
        """As `LayerConfig.state_bytes`: none."""
        return 0


class NoState(NamedTuple):
    """The state and the trace of a layer that remembers nothing."""


class SwiGLU(Layer):
    """Samba, section 2.1.3 (Shazeer, "GLU Variants Improve Transformer", 2020)."""

    apart = True
    residual_output = "down.weight"

    def __init__(self, d_model: int, d_hidden: int):
        super().__init__()
        self.gate_up = Linear(d_model, 2 * d_hidden)
        self.down = Linear(d_hidden, d_model)

    def advance(
        self, x: Float[Tensor, "B T D"], state: NoState | None, segments: Segments | None = None
    ) -> tuple[Float[Tensor, "B T D"], NoState]:
        """As `Layer.advance`; the trace is empty."""
        joint = self.gate_up(x)
        return self.down(cheap("gate", swiglu(joint), swiglu, joint)), NoState()

    def commit(self, state: NoState | None, trace: NoState, keep: Keep | None = None) -> NoState:
        """As `Layer.commit`: always the empty state."""
        return NoState()

    def step_(self, x: Float[Tensor, "B 1 D"], state: NoState, norm: nn.Module) -> Float[Tensor, "B 1 D"]:
        """As `Layer.step_`; on a GPU the three kernels of `swiglu_step`."""
        before = norm_of(norm, self.gate_up, self.down)
        if before is None or not has_step_kernels(x):
            return super().step_(x, state, norm)
        return swiglu_step(x[:, 0].contiguous(), before, self.gate_up.weight, self.down.weight)[:, None]

    def read_piece(
        self, x: Float[Tensor, "B T D"], state: NoState, norm: nn.Module
    ) -> tuple[Float[Tensor, "B T D"], NoState]:
        """As `Layer.read_piece`; on a GPU as so many rows of a step."""
        before = norm_of(norm, self.gate_up, self.down)
        if before is None or not has_piece_kernels(x):
            return super().read_piece(x, state, norm)
        rows = x.flatten(0, 1).contiguous()
        return swiglu_step(rows, before, self.gate_up.weight, self.down.weight).view(x.shape), NoState()

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> NoState:
        """As `Layer.init_state`: empty."""
        return NoState()
