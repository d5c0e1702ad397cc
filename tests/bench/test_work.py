"""The least work of each op, counted by hand for small shapes, and the floors that follow from it."""

import pytest
import torch

from milonga.bench import work
from milonga.bench.ceilings import CPU_EXP_OPERATIONS, Ceilings
from milonga.bench.work import Work, floor_of, floor_of_passes


def given(device="cpu", *, copy=1e9, products=1e12, exps=None):
    """Ceilings as if they had been measured."""
    made = Ceilings(torch.device(device), {"fp32": products, "bf16": 10 * products}, exps)
    made.copies = {1 << power: copy for power in range(16, 31)}
    return made


def test_scan():
    # 6 elements of x, dt, z and y; B and C of 2 steps and 4 states; A of 3 x 4, D and dt_bias of 3
    forward, backward = work.scan_work(B=1, T=2, E=3, N=4, size=2)
    assert forward == Work(bytes=4 * 6 * 2 + 2 * 8 * 2 + (12 + 6) * 4, vector=6 * 26, exps=6 * 7)
    assert backward == Work(bytes=7 * 6 * 2 + 4 * 8 * 2 + 2 * (12 + 6) * 4, vector=6 * 77, exps=6 * 8)


def test_conv():
    # x and y; x, the gradients of y and of x; 3 x 4 taps and 3 biases
    forward, backward = work.conv_work(B=2, T=5, E=3, W=4, size=4)
    assert forward.bytes == 2 * 30 * 4 + 15 * 4
    assert backward.bytes == 3 * 30 * 4 + 2 * 15 * 4
    assert forward.exps == backward.exps == 60


@pytest.mark.parametrize(("T", "window", "pairs"), [(4, 0, 10), (4, 1, 4), (4, 2, 7), (4, 9, 10), (6, 3, 15)])
def test_pairs_are_those_that_a_mask_lets_through(T, window, pairs):
    ahead = torch.arange(T)[:, None] - torch.arange(T)
    assert int(((ahead >= 0) & (ahead < (window or T))).sum()) == pairs == work.visible_pairs(T, window)


def test_attention():
    # two rows, 2 heads of width 8 on 1 key head, 7 pairs each
    forward, backward = work.attention_work(B=2, T=4, H=2, G=1, K=8, w=2, size=2)
    assert forward.products == 2 * 2 * 7 * (2 * 8 + 2 * 8)
    assert backward.products == 2.5 * forward.products
    assert forward.bytes == 2 * (2 * (2 * 4 * 2 * 8) + 2 * (2 * 4 * 1 * 8))
    assert backward.bytes == 2 * (4 * (2 * 4 * 2 * 8) + 4 * (2 * 4 * 1 * 8))


def test_elementwise_ops_read_and_write_everything_once():
    assert work.norm_work(1, 2, 3, 2)[0].bytes == 2 * 6 * 2 + 3 * 4
    assert [one.bytes for one in work.swiglu_work(1, 2, 3, 4)] == [3 * 6 * 4, 5 * 6 * 4]
    assert [one.bytes for one in work.rotary_work(1, 2, 3, 4, 2)] == [2 * 24 * 2, 2 * 24 * 2]


def test_products_with_weights():
    forward, backward = work.linear_work(B=1, T=2, D=3, F=5, size=4)
    assert (forward.products, backward.products) == (2 * 2 * 3 * 5, 2 * 2 * 2 * 3 * 5)
    assert forward.bytes == (2 * 3 + 3 * 5 + 2 * 5) * 4
    forward, backward = work.loss_work(B=1, T=2, D=3, V=5, size=4)
    assert (forward.products, backward.products) == (60, 120)
    assert forward.bytes == (2 * 3 + 3 * 5) * 4 + 2 * (8 + 4), "logits are not moved"
    assert forward.exps == 2 * 5


def test_a_floor_is_the_resource_that_takes_longest():
    ceilings = given()
    assert floor_of(Work(bytes=2e9), ceilings, torch.float32) == work.Floor(2.0, "bytes")
    assert floor_of(Work(bytes=2e9, products=3e12), ceilings, torch.float32) == work.Floor(3.0, "products")
    assert floor_of(Work(bytes=2e9, products=3e12), ceilings, torch.bfloat16) == work.Floor(2.0, "bytes")
    assert floor_of(Work(bytes=0, vector=5e11), ceilings, torch.float32) == work.Floor(1.0, "arithmetic")


def test_exponentials_are_arithmetic_on_a_cpu_and_a_unit_of_their_own_on_a_gpu():
    heavy = Work(bytes=0, vector=1e11, exps=1e11)
    on_cpu = floor_of(heavy, given(), torch.float32)
    assert on_cpu.bound == "arithmetic"
    assert on_cpu.seconds == pytest.approx((1 + CPU_EXP_OPERATIONS) * 1e11 / 5e11)
    assert floor_of(heavy, given("cuda", exps=2e11), torch.float32) == work.Floor(0.5, "exponentials")


def test_the_floor_of_both_passes_is_their_sum():
    floor = floor_of_passes((Work(bytes=1e9), Work(bytes=1e9, products=4e12)), given(), torch.float32)
    assert floor == work.Floor(5.0, "products")


def test_ceilings_are_measured():
    ceilings = Ceilings(torch.device("cpu"))
    small, large = ceilings.copy(1000), ceilings.copy(1 << 20)
    assert set(ceilings.copies) == {1 << 16, 1 << 19}
    assert min(small, large) > 1e8
    assert max(small, large) < 1e13
    rate = ceilings.product(torch.float32)
    assert 1e8 < rate < 1e15
    assert ceilings.vector() == rate / 2
    ceilings.again()
    assert ceilings.product(torch.float32) >= rate
    assert ceilings.exp() is None, "a CPU has no unit for them"
    assert ceilings.to_json()["product_flops_per_second"] == ceilings.products
