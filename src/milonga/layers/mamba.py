"""The Mamba layer (S6), exactly as in Samba section 2.1.1 and MambaByte section 2."""

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from jaxtyping import Float, Float32, Float64
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from milonga.layers.base import Keep, KeepFp32, Layer, LayerConfig, keep_per_sequence, kept_steps, last_columns
from milonga.layers.linear import Linear, StoredLinear, in_parts, products
from milonga.layers.norm import norm_of
from milonga.layers.recompute import cheap, forgotten
from milonga.ops.autocast import under_autocast
from milonga.ops.causal_conv import causal_conv
from milonga.ops.decode_step import MambaWeights, Norm, ReplayInputs, has_step_kernels, mamba_replay_, mamba_step_
from milonga.ops.mamba_mixer import Mixed, mamba_mixer, takes
from milonga.ops.mamba_piece import has_piece_kernels, mamba_piece
from milonga.ops.mamba_step import StepResult, StepWeights, StoredWeight, has_step, mamba_step, prepare_step
from milonga.ops.projected_scan import projected_scan
from milonga.ops.selective_scan import selective_scan
from milonga.segments import Segments, sequence_bounds, sequence_count

if TYPE_CHECKING:
    from milonga.ops.mamba_step.cpu import PreparedWeights


class MambaConfig(LayerConfig):
    """Inner width E = expand * D, N states a channel, convolution of d_conv steps, dt from dt_rank numbers."""

    kind: Literal["mamba"] = "mamba"
    d_state: int = Field(16, ge=1, le=64)
    d_conv: int = Field(4, ge=1, le=8)
    expand: PositiveInt = 2
    dt_rank: PositiveInt | None = None  # None: ceil(d_model / 16)
    dt_min: float = Field(1e-3, gt=0)
    dt_max: float = Field(1e-1, gt=0)
    dt_floor: float = Field(1e-4, gt=0)

    def rank(self, d_model: int) -> int:
        """Width of the bottleneck that dt comes from."""
        return self.dt_rank or math.ceil(d_model / 16)

    def build(self, d_model: int) -> "Mamba":
        """As `LayerConfig.build`."""
        return Mamba(d_model, self)

    def parameter_count(self, d_model: int) -> int:
        """As `LayerConfig.parameter_count`."""
        inner, rank, states = self.expand * d_model, self.rank(d_model), self.d_state
        projections = 3 * d_model * inner + inner * (rank + 2 * states) + rank * inner
        return projections + inner * (self.d_conv + 1) + inner * (states + 2)

    def flops_per_token(self, d_model: int, context: float) -> float:
        """As `LayerConfig.flops_per_token`: products, convolution, and 7 operations per state and step of the scan."""
        inner, rank, states = self.expand * d_model, self.rank(d_model), self.d_state
        products = 3 * d_model * inner + inner * (rank + 2 * states) + rank * inner
        return 2.0 * products + 2.0 * inner * self.d_conv + 7.0 * inner * states

    def state_bytes(self, d_model: int, length: int, dtype: torch.dtype) -> int:
        """As `LayerConfig.state_bytes`: constant, the sums at least fp32."""
        inner = self.expand * d_model
        return inner * ((self.d_conv - 1) * dtype.itemsize + self.d_state * max(4, dtype.itemsize))


class MambaState(NamedTuple):
    """The columns before the next convolution, and the recurrent state."""

    conv: Float[Tensor, "S W-1 E"]
    ssm: Float32[Tensor, "S E N"] | Float64[Tensor, "S E N"]


class MambaTrace(NamedTuple):
    """What a piece adds. The last three are what a replay of its first steps needs."""

    columns: Float[Tensor, "B T E"]  # inputs of the convolution
    final: MambaState | None  # None: to be replayed
    x: Float[Tensor, "B T E"]
    dt: Float[Tensor, "B T E"]  # before bias and softplus
    B: Float[Tensor, "B T N"]
    segments: Segments | None


class ScanParameters(KeepFp32):
    """A_log `[E N]`, D `[E]` and dt's bias `[E]`: fp32 in every mode."""

    def __init__(self, inner: int, states: int):
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(inner, states))
        self.D = nn.Parameter(torch.empty(inner))
        self.dt_bias = nn.Parameter(torch.empty(inner))
        self._kept: tuple[tuple[int, int], Tensor] | None = None

    def A(self) -> Tensor:
        """`-exp(A_log)` `[E N]`.

        In evaluation mode and without gradients it is kept: a decoded token uses it once. It is dropped when A_log is
        seen to change, by `train` and `eval`, and whenever gradients are on: a fused optimizer writes parameters
        without a trace. So does who writes to `.data`: call `eval` after that.
        """
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._kept = None
            return -torch.exp(self.A_log)
        if self.A_log.is_cuda and torch.cuda.is_current_stream_capturing():
            return -torch.exp(self.A_log)  # a graph keeps the address: it must be memory of its own
        key = (self.A_log.data_ptr(), version(self.A_log))
        if self._kept is None or self._kept[0] != key:
            self._kept = key, -torch.exp(self.A_log)
        return self._kept[1]

    def train(self, mode: bool = True) -> "ScanParameters":
        """As in `torch.nn.Module`."""
        self._kept = None
        return super().train(mode)


def version(tensor: Tensor) -> int:
    """How often the tensor was written in place, as far as PyTorch counts it."""
    return 0 if tensor.is_inference() else tensor._version


class StepCache:
    """The weights of a layer's step, prepared for the kernel as long as they stay what and where they are.

    For a decoded token the checks below are most of what the step costs beside its arithmetic, so tensors are looked up
    in the dictionaries that PyTorch keeps them in: a tenth of the time of the attributes.
    """

    def __init__(self) -> None:
        self._key: list[int] = []
        self._prepared: "PreparedWeights | None" = None

    def __reduce__(self) -> tuple[type["StepCache"], tuple[()]]:
        return StepCache, ()  # a copy of the layer has weights elsewhere

    def get(self, layer: "Mamba") -> "PreparedWeights | None":
        """What `layer` is prepared as; None if the kernel does not take it."""
        if _has_any_global_hook():
            return None
        own, modules = layer._parameters, layer._modules
        scan = modules["scan"]
        assert scan is not None
        scan_own = scan._parameters
        tensors: list[Tensor | None] = [
            own["conv_weight"],
            scan_own["A_log"],
            own["conv_bias"],
            scan_own["D"],
            scan_own["dt_bias"],
        ]
        for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
            module = modules[name]
            kind = type(module)
            if module is None or (kind is not Linear and kind is not StoredLinear):
                return None
            if module._forward_hooks or module._forward_pre_hooks:
                return None
            tensors.append((module._parameters if kind is Linear else module._buffers)["weight"])
        # What the kernel has copies of may be written; the rest it reads where it lies.
        key = []
        for index, tensor in enumerate(tensors):
            assert tensor is not None
            key.append(tensor.data_ptr())
            if index < 2:
                key.append(version(tensor))
        if key != self._key:
            self._key, self._prepared = key, prepare_step(layer.step_weights())
        return self._prepared


class Mamba(Layer):
    """Gu and Dao, "Mamba" (2023): projection, short convolution, selective scan, gate, projection."""

    no_decay = ("scan.A_log", "scan.D", "scan.dt_bias", "conv_bias")
    own_init = ("dt_proj.weight", "conv_weight", "conv_bias", "scan.A_log", "scan.D", "scan.dt_bias")
    residual_output = "out_proj.weight"

    def __init__(self, d_model: int, config: MambaConfig):
        super().__init__()
        inner, rank, states = config.expand * d_model, config.rank(d_model), config.d_state
        self.config = config
        self.inner, self.split_sizes = inner, (rank, states, states)
        self.in_proj = Linear(d_model, 2 * inner)
        self.conv_weight = nn.Parameter(torch.empty(inner, config.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(inner))
        self.x_proj = Linear(inner, rank + 2 * states)
        self.dt_proj = Linear(rank, inner)
        self.scan = ScanParameters(inner, states)
        self.out_proj = Linear(inner, d_model)
        self._step_cache: StepCache | None = None
        self._init_own()

    def train(self, mode: bool = True) -> "Mamba":
        """As in `torch.nn.Module`; what was prepared for decoding is prepared anew."""
        self._step_cache = None
        return super().train(mode)

    @torch.no_grad()
    def _init_own(self) -> None:
        """What a model-wide initialisation leaves alone: S4D-real A, D = 1, dt log-uniform, PyTorch's convolution."""
        if self.conv_weight.is_meta:
            return  # nothing to write to
        config, rank = self.config, self.split_sizes[0]
        bound = 1 / math.sqrt(config.d_conv)
        self.conv_weight.uniform_(-bound, bound)
        self.conv_bias.uniform_(-bound, bound)
        self.dt_proj.weight.uniform_(-(rank**-0.5), rank**-0.5)
        self.scan.A_log.copy_(torch.arange(1, config.d_state + 1).log().expand_as(self.scan.A_log))
        self.scan.D.fill_(1.0)
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        dt = (torch.rand_like(self.scan.dt_bias) * (high - low) + low).exp().clamp_min(config.dt_floor)
        self.scan.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of this bias is dt

    def advance(
        self, x: Float[Tensor, "B T D"], state: MambaState | None, segments: Segments | None = None
    ) -> tuple[Float[Tensor, "B T D"], MambaTrace]:
        """As `Layer.advance`."""
        if self.training or torch.is_grad_enabled():
            self._step_cache = None  # a fused optimizer writes parameters without a trace
        elif x.shape[1] == 1 and segments is None and state is not None:
            stepped = self._step(x, state)
            if stepped is not None:
                y, conv, ssm, column, u, dt, B = stepped
                trace = MambaTrace(column[:, None], MambaState(conv, ssm), u[:, None], dt[:, None], B[:, None], None)
                return y[:, None], trace
        conv_initial, ssm_initial = state if state is not None else (None, None)
        if self._one_node(x):
            mixed = self._mix(x, conv_initial, ssm_initial, segments)
            final = MambaState(mixed.conv_final, mixed.final)
            return mixed.out, MambaTrace(mixed.columns, final, mixed.u, mixed.dt, mixed.B, segments)
        columns, z = in_parts(self.in_proj, x, (self.inner, self.inner))
        if conv_initial is not None:
            conv_initial = conv_initial.to(columns.dtype)

        def convolve(columns: Tensor) -> tuple[Tensor, Tensor]:
            return causal_conv(columns, self.conv_weight, self.conv_bias, initial=conv_initial, segments=segments)

        u, conv_final = convolve(columns)
        u = cheap("conv", u, lambda columns: convolve(columns)[0], columns)
        y, ssm_final, dt, B = self._project_and_scan(u, z, ssm_initial, segments)
        return y, MambaTrace(columns, MambaState(conv_final, ssm_final), u, dt, B, segments)

    def _one_node(self, x: Float[Tensor, "B T D"]) -> bool:
        """Whether the scan's output is not to be kept, and the projections are products."""
        if not (forgotten("scan") and takes(x)):
            return False
        return products(self.in_proj, self.x_proj, self.dt_proj, self.out_proj)

    def _mix(
        self,
        x: Float[Tensor, "B T D"],
        conv_initial: Tensor | None,
        ssm_initial: Tensor | None,
        segments: Segments | None,
    ) -> Mixed:
        """The layer as one node of the graph: the same values, gradients that differ by rounding."""
        scan = self.scan
        return mamba_mixer(
            x, self.in_proj.weight, self.conv_weight, self.conv_bias, self.x_proj.weight, self.dt_proj.weight,
            scan.A(), self.out_proj.weight, D=scan.D, dt_bias=scan.dt_bias, conv_initial=conv_initial,
            initial=ssm_initial, segments=segments, recast=forgotten("cast"), keep_u=not forgotten("conv"),
        )  # fmt: skip

    def _project_and_scan(
        self,
        u: Float[Tensor, "B T E"],
        z: Float[Tensor, "B T E"],
        initial: Float32[Tensor, "S E N"] | Float64[Tensor, "S E N"] | None,
        segments: Segments | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What comes after the convolution, see `projected_scan`: -> (output `[B T D]`, final state, dt, B).

        The values are the same to the last bit either way; the gradients differ by rounding.
        """
        A, D, dt_bias = self.scan.A(), self.scan.D, self.scan.dt_bias
        if forgotten("scan") and self._plain(u):
            x_weight, dt_weight, out_weight = (m.taken(u) for m in (self.x_proj, self.dt_proj, self.out_proj))
            return projected_scan(
                u, z, x_weight, dt_weight, A, out_weight, D=D, dt_bias=dt_bias, initial=initial, segments=segments
            )
        low, B, C = self.x_proj(u).split(self.split_sizes, dim=-1)
        dt = cheap("dt", self.dt_proj(low), self.dt_proj, low)
        y, final = selective_scan(u, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, initial=initial, segments=segments)
        return self.out_proj(y), final, dt, B

    def _plain(self, u: Tensor) -> bool:
        """Whether the projections after the convolution are products of one dtype and nothing else."""
        modules = self.x_proj, self.dt_proj, self.out_proj
        if not products(*modules):
            return False
        return under_autocast(u) or all(module.weight.dtype == u.dtype for module in modules)

    def _step(self, x: Float[Tensor, "B 1 D"], state: MambaState) -> StepResult | None:
        """One token of each row by the kernel for decoding on a CPU; None where that does not run."""
        prepared = self.prepared() if has_step(x, *state) else None
        return None if prepared is None else mamba_step(x[:, 0], prepared, *state)

    def prepared(self) -> "PreparedWeights | None":
        """The weights for the kernel of a step; None in training, or where it does not take them. Without gradients."""
        if self.training:
            return None
        if self._step_cache is None:
            self._step_cache = StepCache()
        return self._step_cache.get(self)

    def step_weights(self) -> StepWeights:
        """The weights of one step."""
        scan = self.scan
        stored = [
            StoredWeight(module.weight.detach(), module.scale if isinstance(module, StoredLinear) else None)
            for module in (self.in_proj, self.x_proj, self.dt_proj, self.out_proj)
        ]
        A = -torch.exp(scan.A_log.detach())
        return StepWeights(
            stored[0], self.conv_weight.detach(), self.conv_bias.detach(), stored[1], stored[2],
            A, scan.D.detach(), scan.dt_bias.detach(), stored[3],
        )  # fmt: skip

    def commit(self, state: MambaState | None, trace: MambaTrace, keep: Keep | None = None) -> MambaState:
        """As `Layer.commit`. With `keep`, the accepted steps are replayed from the trace, not run again."""
        if keep is None and trace.final is not None:
            return trace.final
        batch, time = trace.x.shape[:2]
        steps = keep_per_sequence(keep, sequence_bounds(batch, time, trace.segments).diff())
        if state is None:
            rows = sequence_count(batch, trace.segments)
            state = self.init_state(rows, device=trace.x.device, dtype=trace.x.dtype)
        x, packed = kept_steps(trace.x, steps, trace.segments)
        dt, _ = kept_steps(trace.dt, steps, trace.segments)
        B, _ = kept_steps(trace.B, steps, trace.segments)
        A = self.scan.A()
        _, ssm = selective_scan(x, dt, A, B, B, dt_bias=self.scan.dt_bias, initial=state.ssm, segments=packed)
        return MambaState(last_columns(state.conv, trace.columns, steps, trace.segments), ssm)

    def commit_(self, state: MambaState, trace: MambaTrace, keep: Keep | None = None) -> None:
        """As `Layer.commit_`. A `keep` on a GPU is replayed there, row by row in one kernel, without waiting."""
        if isinstance(keep, Tensor) and keep.device.type != "cpu" and trace.segments is None:
            inputs = ReplayInputs(trace.columns, trace.x, trace.dt, trace.B)
            rows = keep.to(torch.int64).expand(trace.x.shape[0])
            mamba_replay_(inputs, self.scan.A_log, self.scan.dt_bias, rows, state.conv, state.ssm)
        else:
            super().commit_(state, trace, keep)

    def step_(self, x: Float[Tensor, "B 1 D"], state: MambaState, norm: nn.Module) -> Float[Tensor, "B 1 D"]:
        """As `Layer.step_`; on a GPU the five kernels of `mamba_step_`."""
        before = self._kernel_norm(norm)
        if before is None or not has_step_kernels(x):
            return super().step_(x, state, norm)
        return mamba_step_(x[:, 0].contiguous(), before, self._kernel_weights(), state.conv, state.ssm)[:, None]

    def read_piece(
        self, x: Float[Tensor, "B T D"], state: MambaState, norm: nn.Module
    ) -> tuple[Float[Tensor, "B T D"], MambaTrace]:
        """As `Layer.read_piece`; on a GPU the kernels of `mamba_piece`, whose trace has no final state."""
        before = self._kernel_norm(norm)
        if before is None or not has_piece_kernels(x):
            return super().read_piece(x, state, norm)
        y, added = mamba_piece(x.contiguous(), before, self._kernel_weights(), state.conv, state.ssm)
        return y, MambaTrace(added.columns, None, added.x, added.dt, added.B, None)

    def _kernel_norm(self, norm: nn.Module) -> Norm | None:
        """The norm as the kernels on a GPU take it; None if they cannot stand for this layer behind it."""
        if self.inner % 16:
            return None
        return norm_of(norm, self.in_proj, self.x_proj, self.dt_proj, self.out_proj)

    def _kernel_weights(self) -> MambaWeights:
        scan = self.scan
        return MambaWeights(
            self.in_proj.weight, self.conv_weight, self.conv_bias, self.x_proj.weight, self.dt_proj.weight,
            scan.A_log, scan.D, scan.dt_bias, self.out_proj.weight,
        )  # fmt: skip

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MambaState:
        """As `Layer.init_state`: zeros; the recurrent state fp32 (float64 where the layer is)."""
        device = device or self.conv_weight.device
        dtype = dtype or self.conv_weight.dtype
        conv = torch.zeros(batch, self.config.d_conv - 1, self.inner, device=device, dtype=dtype)
        ssm = torch.zeros(batch, self.inner, self.config.d_state, device=device, dtype=self.scan.A_log.dtype)
        return MambaState(conv, ssm)
