"""Other implementations of the same ops, each asked only where its package can be imported.

One module for a package, named as the package with `_peer` behind it; it imports the package plainly, says in `OFFERS`
which ops it has, and lays out the inputs as the package wants them. A module with `_models` behind it has whole models.
`INSTALLED` is the one place that asks what there is; a package that is there and cannot be imported is left out with
its reason.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec

from torch import nn

from milonga.bench.cases import Case, Contender
from milonga.models import ModelConfig

PACKAGES = ("torch", "mamba_ssm", "causal_conv1d", "fla", "mambapy", "transformers")
# Whether each can be imported, found without importing it.
INSTALLED = {package: find_spec(package) is not None for package in PACKAGES}
# Which packages have something to put beside an op.
OF_OP: Mapping[str, tuple[str, ...]] = {
    "scan": ("mamba_ssm", "mambapy", "transformers"),
    "conv": ("torch", "causal_conv1d", "fla"),
    "attention": ("torch",),
    "norm": ("torch", "fla", "transformers"),
    "swiglu": ("torch", "fla"),
    "rotary": ("fla", "transformers"),
    "loss": ("torch", "fla"),
    "linear": ("torch",),
}

# Which packages have whole models to train.
WITH_MODELS = ("mamba_ssm", "fla", "transformers")

Offer = Callable[[Case], list[Contender]]


def absent(packages: Iterable[str]) -> list[str]:
    """A sentence that names those of `packages` that are not installed; none if all are."""
    missing = sorted({package for package in packages if not INSTALLED[package]})
    return [f"not beside it, since not installed: {', '.join(missing)}"] if missing else []


def peers_of(case: Case) -> tuple[list[Contender], dict[str, str]]:
    """What stands beside our op: -> (contenders, package -> why it is left out)."""
    made: list[Contender] = []
    left_out: dict[str, str] = {}
    for package in OF_OP[case.op]:
        if not INSTALLED[package]:
            continue
        try:
            made += import_module(f"milonga.bench.peers.{package}_peer").OFFERS[case.op](case)
        except Exception as error:  # a package built for another PyTorch fails in ways of its own
            left_out[package] = one_line(error)
    return made, left_out


def one_line(error: Exception) -> str:
    """An error of somebody else's, shortened."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]


def peer_models(config: ModelConfig, device_type: str) -> Iterator[tuple[str, nn.Module | str]]:
    """Models of this shape, one after the other: package -> tokens to mean loss, or why it is left out."""
    for package in WITH_MODELS:
        if not INSTALLED[package]:
            continue
        try:
            made = import_module(f"milonga.bench.peers.{package}_models").model(config, device_type)
        except Exception as error:
            yield package, one_line(error)
            continue
        if made is not None:
            yield package, made
