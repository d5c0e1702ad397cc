"""Other implementations of the same ops, each asked only where its package can be imported.

One module for a package, named as the package with `_peer` behind it; it imports the package plainly, says in `OFFERS`
which ops it has, and lays out the inputs as the package wants them. `INSTALLED` is the one place that asks what there
is; a package that is there and cannot be imported is left out with its reason.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec

from milonga.bench.cases import Case, Contender

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

Offer = Callable[[Case], list[Contender]]


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
            left_out[package] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]
    return made, left_out
