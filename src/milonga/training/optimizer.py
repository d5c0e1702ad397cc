"""Optimizers over named parameter groups: AdamW, and Muon for the hidden matrices."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from milonga.models import Network
from milonga.ops.adamw import Columns, Table, move_, takes
from milonga.training.muon import StackedMuon, unhooked

Parameters = dict[str, nn.Parameter]


class OptimizerConfig(BaseModel):
    """How parameters move.

    Args:
        name: `adamw`, or `muon`: Muon for the weights of linear layers inside the stack, AdamW for everything else.
        lr: the peak learning rate.
        muon_lr: Muon's own peak; None is `lr` (its updates are scaled to AdamW's root mean square).
        muon_momentum: Muon's momentum.
        betas, eps: AdamW's.
        weight_decay: decoupled, times the current rate.
        decay: `declared` leaves out norms and what layers declare as `no_decay`; `all` decays every parameter, as the
            Samba code did.
        clip: largest norm of the gradient of all parameters together; None does not clip.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["adamw", "muon"] = "adamw"
    lr: PositiveFloat = 1e-3
    muon_lr: PositiveFloat | None = None
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    decay: Literal["declared", "all"] = "declared"
    clip: PositiveFloat | None = 1.0


class _AdamW(torch.optim.AdamW):
    """AdamW whose fused step takes two numbers from where the gradients are.

    On a GPU, for plain tensors in fp32, the step is a kernel of ours over PyTorch's own state, which leaves gradients
    as they are; anywhere else it is PyTorch's.
    """

    grad_scale: Tensor | None = None  # fp32 []: gradients are divided by it
    found_inf: Tensor | None = None  # fp32 []: where it is 1 nothing moves
    _tables: tuple[Table, ...] = ()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move every parameter that has a gradient along it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [self._tensors(group) for group in self.param_groups]
        if None in groups:
            unhooked(torch.optim.AdamW.step)(self)
            return loss
        if len(self._tables) != len(groups):
            self._tables = tuple(Table() for _ in groups)
        for group, tensors, table in zip(self.param_groups, groups, self._tables, strict=True):
            if tensors is not None and tensors[0]:
                settings = (group["lr"], group["betas"], group["eps"], group["weight_decay"])
                move_(tensors, *settings, self.grad_scale, self.found_inf, table)
        return loss

    def _tensors(self, group: dict[str, Any]) -> Columns | None:
        """What our kernel moves of a group; None where the step must be PyTorch's."""
        unknown = ("amsgrad", "maximize", "differentiable", "capturable")
        moved = [p for p in group["params"] if p.grad is not None]
        plain = all(isinstance(number, float) for number in (group["lr"], *group["betas"]))
        if not group["fused"] or any(group[name] for name in unknown) or not plain:
            return None
        if not moved:
            return [], [], [], [], []
        if not moved[0].is_cuda or torch.cuda.is_current_stream_capturing():
            return None
        for p in moved:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        states = [self.state[p] for p in moved]
        gradients = [p.grad for p in moved if p.grad is not None]
        exp_avgs, exp_avg_sqs, steps = ([state[of] for state in states] for of in ("exp_avg", "exp_avg_sq", "step"))
        tensors = (moved, gradients, exp_avgs, exp_avg_sqs, steps)
        return tensors if takes(tensors) else None


class Optimizer:
    """One or two of PyTorch's optimizers that cover every parameter once, driven as one."""

    def __init__(self, parts: list[torch.optim.Optimizer], names: Mapping[str, nn.Parameter]):
        self.parts = parts
        self.names = dict(names)

    def groups(self) -> Iterator[dict[str, Any]]:
        """Every parameter group; `lr_scale` is its rate relative to AdamW's."""
        for part in self.parts:
            yield from part.param_groups

    def set_learning_rate(self, lr: float) -> None:
        """The rate of the next step (of AdamW; Muon's follows in proportion)."""
        for group in self.groups():
            group["lr"] = lr * group["lr_scale"]

    @property
    def decides(self) -> bool:
        """Whether a step can be clipped or left out by numbers that the host has not seen: see `step`."""
        return all(isinstance(part, _AdamW) and part.defaults["fused"] for part in self.parts)

    def step(self, scale: Tensor | None = None, skip: Tensor | None = None) -> None:
        """Move every parameter along its gradient.

        Args:
            scale: fp32 `[]` on the device: what gradients are divided by, perhaps in place. Only where `decides`.
            skip: fp32 `[]`: where it is 1 nothing moves and no step is counted. Only where `decides`.
        """
        assert self.decides or (scale is None and skip is None), "Muon would take neither"
        for part in self.parts:
            if isinstance(part, _AdamW):
                part.grad_scale, part.found_inf = scale, skip
            part.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """All moments and step counts, named `parameter/moment`: what a checkpoint holds."""
        held = {}
        for name, parameter in self.names.items():
            for part in self.parts:
                for moment, value in part.state.get(parameter, {}).items():
                    held[f"{name}/{moment}"] = value
        return held

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`.

        Raises:
            ValueError: naming a tensor of a parameter that this optimizer does not have, or of another shape.
        """
        owner = {id(p): part for part in self.parts for group in part.param_groups for p in group["params"]}
        for part in self.parts:
            part.state.clear()
        for key, value in tensors.items():
            name, _, moment = key.rpartition("/")
            if name not in self.names:
                raise ValueError(f"optimizer: {key} belongs to no parameter of this model")
            parameter = self.names[name]
            if value.ndim and value.shape != parameter.shape:
                raise ValueError(f"optimizer: {key} must be {list(parameter.shape)}, got {list(value.shape)}")
            owner[id(parameter)].state[parameter][moment] = value.to(parameter.device, copy=True)


def _split_by_decay(network: Network, parameters: Parameters, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups of AdamW or Muon: with weight decay and without; empty groups are left out."""
    exempt = network.no_decay() if config.decay == "declared" else {}
    own = dict(network.named_parameters())
    for name, parameter in exempt.items():
        if own.get(name) is not parameter:
            raise ValueError(f"optimizer: no_decay names {name!r}, which is no parameter of this model")
    decayed = [p for name, p in parameters.items() if name not in exempt]
    spared = [p for name, p in parameters.items() if name in exempt]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _hidden_matrices(network: Network) -> Parameters:
    """The weights of linear layers in the stack: what Muon orthogonalises. Embedding and head are not among them."""
    return {
        f"sublayers.{name}.weight": module.get_parameter("weight")
        for name, module in network.sublayers.named_modules()
        if isinstance(module, nn.Linear)
    }


def build_optimizer(network: Network, config: OptimizerConfig) -> Optimizer:
    """The optimizer of all parameters of `network`, each in exactly one group. Deterministic.

    Raises:
        ValueError: if a layer exempts from decay what does not exist.
    """
    parameters: Parameters = dict(network.named_parameters())
    matrices = _hidden_matrices(network) if config.name == "muon" else {}
    rest = {name: p for name, p in parameters.items() if name not in matrices}
    adamw = _AdamW(
        _split_by_decay(network, rest, config),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=all(p.device.type in ("cpu", "cuda") for p in rest.values()),
    )
    parts: list[torch.optim.Optimizer] = [adamw]
    if matrices:
        parts.append(
            StackedMuon(
                _split_by_decay(network, matrices, config),
                lr=config.muon_lr or config.lr,
                momentum=config.muon_momentum,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    optimizer = Optimizer(parts, parameters)
    for group in optimizer.groups():
        group["lr_scale"] = group["lr"] / config.lr
    return optimizer
