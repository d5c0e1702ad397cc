"""The ops that `milonga bench ops` measures: inputs laid out as the layers lay them out, and their least work."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from milonga.bench import work
from milonga.bench.work import Passes
from milonga.errors import UserError
from milonga.ops import (
    causal_conv,
    linear,
    linear_cross_entropy,
    rms_norm,
    rotary,
    selective_scan,
    swiglu,
    window_attention,
)
from milonga.ops.backend import choice

Letters = dict[str, int]


@dataclass(frozen=True)
class Contender:
    """One implementation: `run(*leaves)` gives the output; gradients go to the leaves."""

    name: str
    leaves: tuple[Tensor, ...]
    run: Callable[..., Tensor]
    needs: float = 0.0  # bytes it is known to hold at once, beyond its inputs; 0 if that is modest
    slow_backward: bool = False  # minutes for one call: only its forward pass is measured


@dataclass(frozen=True)
class Case:
    """An op on fixed inputs."""

    op: str
    letters: Letters
    ours: Contender
    passes: Passes
    dtype: torch.dtype


@dataclass(frozen=True)
class Op:
    """How an op is measured.

    Attributes:
        name: on the command line.
        function: the public function of `milonga.ops`.
        letters: of a shape, in order.
        defaults: of the trailing letters, which `--shape` may leave out.
        on_gpu, on_cpu: shapes where none is given.
        build: letters, device, dtype -> the case.
    """

    name: str
    function: str
    letters: tuple[str, ...]
    defaults: Mapping[str, int]
    on_gpu: tuple[tuple[int, ...], ...]
    on_cpu: tuple[tuple[int, ...], ...]
    build: Callable[[Letters, torch.device, torch.dtype], Case]

    def shape(self, numbers: tuple[int, ...]) -> Letters:
        """The letters of a shape given in numbers.

        Raises:
            UserError: if there are too few or too many numbers, or one is not positive (only the window may be 0).
        """
        needed = len(self.letters) - len(self.defaults)
        if not needed <= len(numbers) <= len(self.letters):
            optional = "".join(f"[,{letter}]" for letter in self.letters[needed:])
            expected = ",".join(self.letters[:needed]) + optional
            raise UserError(f"--shape: {self.name} takes {expected}, got {','.join(map(str, numbers))}")
        letters = dict(self.defaults) | dict(zip(self.letters, numbers, strict=False))
        for letter in self.letters:
            if letters[letter] < (0 if letter == "w" else 1):
                raise UserError(f"--shape: {letter} of {self.name} must be at least 1, got {letters[letter]}")
        if self.name == "conv" and letters["W"] > 8:
            raise UserError(f"--shape: W of conv must be at most 8, got {letters['W']}")
        if self.name == "attention" and letters["H"] % letters["G"]:
            raise UserError(f"--shape: G of attention must divide H, got H {letters['H']} and G {letters['G']}")
        return {letter: letters[letter] for letter in self.letters}

    def backend(self, device: torch.device, dtype: torch.dtype) -> str:
        """What the library runs it on there."""
        if self.function == "linear":
            return "PyTorch" if device.type == "cuda" else "oneDNN" if dtype == torch.float32 else "PyTorch"
        return choice(self.function, "auto", device.type, dtype)


class _Maker:
    """Random inputs from one seed, each a leaf that gradients go to."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        made = torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return made.to(dtype or self.dtype).requires_grad_()

    def parts(self, batch: int, time: int, *widths: int) -> list[Tensor]:
        """Slices of one wide projection `[B T sum(widths)]`."""
        whole = self.normal(batch, time, sum(widths)).detach()
        return [part.detach().requires_grad_() for part in whole.split(widths, dim=-1)]


def _scan(s: Letters, device: torch.device, dtype: torch.dtype) -> Case:
    """x from the convolution, z beside it in one projection, B and C behind dt's numbers in another."""
    B, T, E, N = s["B"], s["T"], s["E"], s["N"]
    make = _Maker(device, dtype)
    x, dt = make.normal(B, T, E), make.normal(B, T, E)
    _, z = make.parts(B, T, E, E)
    _, b, c = make.parts(B, T, max(1, E // 32), N, N)
    A = -torch.arange(1, N + 1, device=device, dtype=torch.float32).expand(E, N).contiguous()
    D = make.normal(E, dtype=torch.float32)
    # steps between 1/1000 and 1/10, as layers begin
    bias = (torch.rand(E, generator=make.generator, device=device) * 4.6 - 6.9).requires_grad_()

    def run(x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
        return selective_scan(x, dt, A, b, c, D=D, z=z, dt_bias=bias)[0]

    leaves = (x, dt, A.requires_grad_(), b, c, D, z, bias)
    return Case("scan", s, Contender("milonga", leaves, run), work.scan_work(B, T, E, N, dtype.itemsize), dtype)


def _conv(s: Letters, device: torch.device, dtype: torch.dtype) -> Case:
    """x is a half of a projection."""
    B, T, E, W = s["B"], s["T"], s["E"], s["W"]
    make = _Maker(device, dtype)
    x, _ = make.parts(B, T, E, E)
    weight, bias = make.normal(E, W), make.normal(E)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv(x, weight, bias)[0]

    passes = work.conv_work(B, T, E, W, dtype.itemsize)
    return Case("conv", s, Contender("milonga", (x, weight, bias), run), passes, dtype)


def _attention(s: Letters, device: torch.device, dtype: torch.dtype) -> Case:
    B, T, H, G, K, w = s["B"], s["T"], s["H"], s["G"], s["K"], s["w"]
    make = _Maker(device, dtype)
    q, k, v = make.normal(B, T, H, K), make.normal(B, T, G, K), make.normal(B, T, G, K)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return window_attention(q, k, v, window=w or None)

    passes = work.attention_work(B, T, H, G, K, w, dtype.itemsize)
    return Case("attention", s, Contender("milonga", (q, k, v), run), passes, dtype)


def _norm(s: Letters, device: torch.device, dtype: torch.dtype) -> Case:
    make = _Maker(device, dtype)
    leaves = make.normal(s["B"], s["T"], s["D"]), make.normal(s["D"], dtype=torch.float32)
    passes = work.norm_work(s["B"], s["T"], s["D"], dtype.itemsize)
    return Case("norm", s, Contender("milonga", leaves, rms_norm), passes, dtype)


def _swiglu(s: Letters, device: torch.device, dtype: torch.dtype) -> Case:
    gate, up = _Maker(device, dtype).parts(s["B"], s["T"], s["F"], s["F"])
    passes = work.swiglu_work(s["B"], s["T"], s["F"], dtype.itemsize)
    return Case("swiglu", s, Contender("milonga", (gate, up), swiglu), passes, dtype)


def _rotary(s: Letters, device: torch.device, dtype: torch.dtype) -> Case:
    """Queries and keys side by side, values behind them in the same projection."""
    B, T, H, K = s["B"], s["T"], s["H"], s["K"]
    if K % 2:
        raise UserError(f"--shape: K of rotary must be even, got {K}")
    x, _ = _Maker(device, dtype).parts(B, T, H * K, K)
    positions = torch.arange(T, device=device)

    def run(x: Tensor) -> Tensor:
        return rotary(x, positions)

    x = x.detach().unflatten(-1, (H, K)).detach().requires_grad_()
    return Case("rotary", s, Contender("milonga", (x,), run), work.rotary_work(B, T, H, K, dtype.itemsize), dtype)


def targets_of(s: Letters, device: torch.device) -> Tensor:
    """The targets of the loss, int64 `[B T]`."""
    return torch.arange(s["B"] * s["T"], device=device).view(s["B"], s["T"]) * 7919 % s["V"]


def _loss(s: Letters, device: torch.device, dtype: torch.dtype) -> Case:
    make = _Maker(device, dtype)
    x = make.normal(s["B"], s["T"], s["D"])
    weight = (make.normal(s["V"], s["D"]).detach() * s["D"] ** -0.5).requires_grad_()
    targets = targets_of(s, device)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, targets)

    passes = work.loss_work(s["B"], s["T"], s["D"], s["V"], dtype.itemsize)
    return Case("loss", s, Contender("milonga", (x, weight), run), passes, dtype)


def _linear(s: Letters, device: torch.device, dtype: torch.dtype) -> Case:
    make = _Maker(device, dtype)
    leaves = make.normal(s["B"], s["T"], s["D"]), make.normal(s["F"], s["D"])
    passes = work.linear_work(s["B"], s["T"], s["D"], s["F"], dtype.itemsize)
    return Case("linear", s, Contender("milonga", leaves, linear), passes, dtype)


_BTE = ("B", "T", "E")
_HEADS = ("B", "T", "H", "G", "K", "w")
_SCANS = ((8, 4096, 3072, 16), (1, 4096, 4608, 16), (1, 131072, 4608, 16))
_ATTENTIONS = ((8, 4096, 12, 12, 128, 2048), (1, 131072, 12, 4, 128, 2048))

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op("scan", "selective_scan", (*_BTE, "N"), {"N": 16}, _SCANS, ((1, 1024, 1536, 16),), _scan),
        Op(
            "conv",
            "causal_conv",
            (*_BTE, "W"),
            {"W": 4},
            ((8, 4096, 3072, 4), (1, 131072, 4608, 4)),
            ((1, 1024, 1536, 4),),
            _conv,
        ),
        Op("attention", "window_attention", _HEADS, {"w": 0}, _ATTENTIONS, ((8, 512, 6, 6, 32, 128),), _attention),
        Op("norm", "rms_norm", ("B", "T", "D"), {}, ((8, 4096, 1536),), ((8, 512, 192),), _norm),
        Op("swiglu", "swiglu", ("B", "T", "F"), {}, ((8, 4096, 4096),), ((8, 512, 512),), _swiglu),
        Op("rotary", "rotary", ("B", "T", "H", "K"), {}, ((8, 4096, 24, 128),), ((8, 512, 12, 32),), _rotary),
        Op(
            "loss",
            "linear_cross_entropy",
            ("B", "T", "D", "V"),
            {},
            ((8, 4096, 1536, 32000),),
            ((8, 512, 192, 256),),
            _loss,
        ),
        Op("linear", "linear", ("B", "T", "D", "F"), {}, ((8, 4096, 1536, 8192),), ((8, 512, 192, 1024),), _linear),
    )
}
