"""What an op must at least do: bytes to move and operations to carry out, counted from its shape alone.

Bytes: every input is read once and every output written once; nothing in between is stored, whatever an implementation
keeps for its backward pass. Operations: matrix products in FLOPs; everything else in fp32 operations of which a
multiply-add is one; exponentials and reciprocals are counted apart, for a GPU has a unit of its own for them; on a CPU
they are arithmetic. The floor is the time of the resource that is needed longest, each at the rate measured in the same
run; that of both passes is the sum of the two.
"""

from dataclasses import dataclass

import torch

from milonga.bench.ceilings import CPU_EXP_OPERATIONS, Ceilings


@dataclass(frozen=True)
class Work:
    """What one pass must do at least."""

    bytes: float
    products: float = 0.0
    vector: float = 0.0
    exps: float = 0.0


@dataclass(frozen=True)
class Floor:
    """Seconds below which no implementation can be on this machine, and what says so."""

    seconds: float
    bound: str  # `bytes`, `products`, `arithmetic` or `exponentials`


Passes = tuple[Work, Work]  # forward, backward


def floor_of(work: Work, ceilings: Ceilings, dtype: torch.dtype) -> Floor:
    """The floor of one pass whose matrix products are in `dtype`."""
    parts = {"bytes": work.bytes / ceilings.copy(work.bytes)}
    if work.products:
        parts["products"] = work.products / ceilings.product(dtype)
    operations = work.vector
    if ceilings.device.type == "cpu":
        operations += CPU_EXP_OPERATIONS * work.exps
    elif work.exps and (rate := ceilings.exp()) is not None:
        parts["exponentials"] = work.exps / rate
    if operations:
        parts["arithmetic"] = operations / ceilings.vector()
    bound = max(parts, key=lambda name: parts[name])
    return Floor(parts[bound], bound)


def floor_of_passes(passes: tuple[Work, ...], ceilings: Ceilings, dtype: torch.dtype) -> Floor:
    """The sum of the passes' floors; the bound is that of the longest."""
    floors = [floor_of(work, ceilings, dtype) for work in passes]
    return Floor(sum(one.seconds for one in floors), max(floors, key=lambda one: one.seconds).bound)


def scan_work(B: int, T: int, E: int, N: int, size: int) -> Passes:
    """The selective scan with z, D and dt_bias. `size`: bytes of an element of x.

    Forward, per state: the exponent, the decay's exponential, the input's product, the update and the sum over states
    (4 multiply-adds, 1 exponential); per channel and step the exponential of softplus (a polynomial gives its
    logarithm), exponential and reciprocal of the gate, and about 10 operations around them. Backward, per state: the
    states again (3 and 1 exponential) and 10 for the gradients; per channel and step 4 exponentials and about 25.
    """
    steps, small = B * T * E, (E * N + 2 * E) * 4.0
    states = 2 * B * T * N * size
    return (
        Work(4 * steps * size + states + small, vector=steps * (4 * N + 10), exps=steps * (N + 3)),
        Work(7 * steps * size + 2 * states + 2 * small, vector=steps * (13 * N + 25), exps=steps * (N + 4)),
    )


def conv_work(B: int, T: int, E: int, W: int, size: int) -> Passes:
    """The short convolution with bias and SiLU (an exponential and a reciprocal each way)."""
    steps, small = B * T * E, E * (W + 1) * 4.0
    return (
        Work(2 * steps * size + small, vector=steps * (W + 2), exps=2 * steps),
        Work(3 * steps * size + 2 * small, vector=steps * (3 * W + 6), exps=2 * steps),
    )


def visible_pairs(T: int, window: int) -> int:
    """Pairs of a query and a key it sees, in one row and head; a window of 0 is none."""
    w = min(window or T, T)
    return w * (w + 1) // 2 + (T - w) * w


def attention_work(B: int, T: int, H: int, G: int, K: int, w: int, size: int) -> Passes:
    """Causal attention: two products of a pair forward, five backward (the scores again), an exponential each time."""
    pairs = B * H * visible_pairs(T, w)
    queries, keys = B * T * H * K * size, B * T * G * K * size
    return (
        Work(2 * queries + 2 * keys, products=4.0 * pairs * K, exps=pairs),
        Work(4 * queries + 4 * keys, products=10.0 * pairs * K, exps=pairs),
    )


def norm_work(B: int, T: int, D: int, size: int) -> Passes:
    """RMSNorm."""
    steps = B * T * D
    return (
        Work(2 * steps * size + 4.0 * D, vector=3 * steps),
        Work(3 * steps * size + 8.0 * D, vector=7 * steps),
    )


def swiglu_work(B: int, T: int, F: int, size: int) -> Passes:
    """silu(gate) * up: an exponential and a reciprocal each way."""
    steps = B * T * F
    return (
        Work(3.0 * steps * size, vector=3 * steps, exps=2 * steps),
        Work(5.0 * steps * size, vector=9 * steps, exps=2 * steps),
    )


def rotary_work(B: int, T: int, H: int, K: int, size: int) -> Passes:
    """Two multiply-adds a number; one sine and one cosine for a pair of numbers, shared by the heads and the rows."""
    steps = B * T * H * K
    one = Work(2.0 * steps * size, vector=2 * steps, exps=T * K)
    return one, one


def loss_work(B: int, T: int, D: int, V: int, size: int) -> Passes:
    """The loss of a linear classifier: logits are never moved; their gradient makes two products more."""
    rows = B * T
    products, weight = 2.0 * rows * D * V, V * D * size
    return (
        Work(rows * D * size + weight + 12 * rows, products=products, exps=rows * V),
        Work(2 * rows * D * size + 2 * weight + 12 * rows, products=2 * products, vector=rows * V),
    )


def linear_work(B: int, T: int, D: int, F: int, size: int) -> Passes:
    """x weight^T."""
    rows = B * T
    products, weight = 2.0 * rows * D * F, F * D * size
    return (
        Work(rows * (D + F) * size + weight, products=products),
        Work((2 * rows * D + rows * F) * size + 2 * weight, products=2 * products),
    )
