"""AdamW's kernels under Triton's interpreter, on CPU tensors, against AdamW in float64.

Run by `test_triton_interpreted.py` in a process of its own: the interpreter must be chosen before Triton is imported.
"""

import pytest
import torch
from torch import Tensor

from milonga.ops.adamw import ERROR_BOUND, Table, triton
from tests.ops.helpers import relative_rms
from tests.ops.interpreter import prepare

prepare()

SIZES = (1, 7, 0, triton._CHUNK - 1, triton._CHUNK, triton._CHUNK + 1, 10000)
LR, BETAS, EPS = 1e-2, (0.9, 0.95), 1e-8
NAMES = ("parameter", "gradient", "exp_avg", "exp_avg_sq", "step")


def placed(size: int, shift: int) -> Tensor:
    """Random numbers that begin `shift` numbers behind a multiple of 64 bytes, with others around them."""
    whole = torch.randn(size + shift + 40)
    first = -(whole.data_ptr() // 4) % 16 + shift
    view = whole[first : first + size]
    assert view.data_ptr() % 64 == 4 * shift or not size
    return view


def made(shifts: tuple[int, int, int, int]) -> tuple[list[Tensor], ...]:
    """Parameters, gradients, moments and step counts of `SIZES`; the state is that of no step."""
    columns = tuple([placed(size, shift) for size in SIZES] for shift in shifts)
    for column in columns[2:]:
        for moment in column:
            moment.zero_()
    return *columns, [torch.zeros(()) for _ in SIZES]


def exact(
    before: list[Tensor], lr: float, betas: tuple[float, float], decay: float, scale: float = 1.0
) -> list[Tensor]:
    """One step of one tensor in float64: -> what the step adds to the parameter, and the moments and count after it."""
    p, g, m, v, t = (value.double() for value in before)
    g, t = g / scale, t + 1
    m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
    update = m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + EPS)
    return [-lr * decay * p - lr * update, m, v, t]


def copies(tensors: tuple[list[Tensor], ...]) -> list[list[Tensor]]:
    """-> for each tensor, all that a step sees of it."""
    return [[value.clone() for value in row] for row in zip(*tensors, strict=True)]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(("scale", "shifts"), [(None, (0, 0, 0, 0)), (3.7, (0, 0, 0, 0)), (3.7, (0, 1, 0, 2))])
def test_five_steps_are_those_of_float64(decay: float, scale: float | None, shifts: tuple[int, int, int, int]) -> None:
    """With a step in the middle that is left out: not a bit moves then, and gradients never do."""
    torch.manual_seed(0)
    tensors, table = made(shifts), Table()
    masters = [row[0].double() for row in zip(*tensors, strict=True)]
    moments = [[value.double() for value in row[2:]] for row in zip(*tensors, strict=True)]
    number = None if scale is None else torch.tensor(scale)
    for count, skip in enumerate((0.0, 0.0, 1.0, 0.0, 0.0, 0.0)):
        for gradient in tensors[1]:
            gradient.copy_(torch.randn(gradient.shape))
        before = copies(tensors)
        triton.step(
            table, tensors, lr=LR, betas=BETAS, eps=EPS, weight_decay=decay, scale=number, skip=torch.tensor(skip)
        )
        after = copies(tensors)
        for i, (old, new) in enumerate(zip(before, after, strict=True)):
            assert torch.equal(old[1], new[1]), "a gradient was written"
            if skip:
                assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
                continue
            added, *moments[i] = exact([masters[i], old[1], *moments[i]], LR, BETAS, decay, scale or 1.0)
            masters[i] = masters[i] + added
            assert new[4] == moments[i][2] == (count + 1 if count < 2 else count)
            if SIZES[i]:
                assert (new[0] - masters[i]).abs().max() < 5e-7 * new[0].abs().max().clamp_min(1.0)
                assert (new[2] - moments[i][0]).abs().max() < 1e-6, "of gradients near 1, which may cancel"
                assert relative_rms(new[3], moments[i][1]) < 5 * ERROR_BOUND


def test_what_lies_around_a_tensor_is_left_alone() -> None:
    whole = [torch.randn(9000) for _ in range(4)]
    whole[3].abs_()
    for first, size in ((0, 4097), (3, 4096), (8, 31), (5, 8200)):
        before = [value.clone() for value in whole]
        tensors = *([value[first : first + size]] for value in whole), [torch.tensor(4.0)]
        triton.step(
            Table(), tensors, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.1, scale=None, skip=None
        )  # fmt: skip
        for old, new in zip(before, whole, strict=True):
            assert torch.equal(old[:first], new[:first])
            assert torch.equal(old[first + size :], new[first + size :])
        assert not torch.equal(before[0][first : first + size], whole[0][first : first + size])


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.9, 0.0), (0.9, 0.01), (0.3, 0.4), (0.6, 0.5)])
def test_little_after_much_is_not_lost(betas: tuple[float, float]) -> None:
    """A mean that forgets at once is of the last gradient, however large the one before was."""
    row = [torch.ones(64), torch.zeros(64), torch.zeros(64), torch.zeros(64), torch.zeros(())]
    table = Table()
    for size in (1.0, 1e-5):
        row[1].fill_(size)
        expected, before = exact(row, LR, betas, 0.0), row[0].clone()
        row[0].zero_()  # what a step adds, not rounded beside the parameter
        triton.step(
            table, tuple([value] for value in row), lr=LR, betas=betas, eps=EPS, weight_decay=0.0, scale=None, skip=None
        )
        for got, wanted in zip((row[0], *row[2:]), expected, strict=True):
            assert relative_rms(got, wanted) <= ERROR_BOUND
        row[0].add_(before)


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.0, 0.99999)])
@pytest.mark.parametrize("steps", [0, 1, 99, 10**4, 10**6 - 1])
def test_bias_corrections_hold_to_the_last_digits(betas: tuple[float, float], steps: int) -> None:
    """Of the first step and of the millionth: what is added to a parameter of 0 is as exact as fp32."""
    row = [torch.zeros(33), torch.randn(33), torch.randn(33), torch.rand(33), torch.tensor(float(steps))]
    expected = exact(row, LR, betas, 0.1)
    triton.step(
        Table(), tuple([value] for value in row), lr=LR, betas=betas, eps=EPS, weight_decay=0.1, scale=None, skip=None
    )
    for got, value in zip((row[0], *row[2:]), expected, strict=True):
        assert relative_rms(got, value) < ERROR_BOUND


def test_small_decay_is_not_lost() -> None:
    """Decays of 1e-6 of a parameter a step: the mean of many is right within what rounding leaves of it."""
    p = torch.rand(100_000) + 1.0
    row = [p.clone(), torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p), torch.tensor(0.0)]
    triton.step(
        Table(), tuple([value] for value in row), lr=1e-5, betas=BETAS, eps=EPS, weight_decay=0.1, scale=None, skip=None
    )
    assert float(((p.double() - row[0].double()) / p).mean()) == pytest.approx(1e-6, rel=1e-3)


def test_a_table_follows_tensors_that_move() -> None:
    """Gradients elsewhere at every step, tensors that come and go, and the bits of tables made anew."""
    tensors, kept = made((0, 0, 0, 0)), Table()
    others = tuple([value.clone() for value in column] for column in tensors)
    for step in range(4):
        chosen = [i for i in range(len(SIZES)) if step != 2 or i % 2]
        gradients = [placed(SIZES[i], step % 2) for i in chosen]
        for held, table in ((tensors, kept), (others, Table())):
            columns = [[column[i] for i in chosen] for column in held]
            columns[1] = gradients
            triton.step(
                table, columns, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.1, scale=None, skip=None
            )  # fmt: skip
    assert [float(step) for step in tensors[4]] == [4.0 if i % 2 else 3.0 for i in range(len(SIZES))]
    for place in (0, 2, 3, 4):
        assert all(torch.equal(a, b) for a, b in zip(tensors[place], others[place], strict=True)), NAMES[place]
