"""Orders without memory: bijections that the keys choose."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from milonga.data.permutation import draw, mix, permute


@given(st.integers(1, 700), st.integers(-5, 2**70), st.integers(0, 2**40))
def test_every_element_exactly_once(size: int, seed: int, epoch: int):
    image = permute(np.arange(size), size, seed, epoch)
    assert sorted(image.tolist()) == list(range(size))
    assert permute(np.array([size - 1, 0]), size, seed, epoch).tolist() == [image[-1], image[0]]


def test_sizes_beyond_memory():
    size = 10**17 + 3
    image = permute(np.arange(1000), size, 5)
    assert len(set(image.tolist())) == 1000
    assert image.min() >= 0
    assert image.max() < size
    assert 0.4 * size < image.mean() < 0.6 * size


def test_all_orders_of_a_small_set_are_about_as_likely():
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(6000):
        order = tuple(permute(np.arange(4), 4, seed).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    expected = 6000 / 24
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < 49.7  # 23 degrees of freedom: 0.1 % of random orders would exceed this


def test_neighbours_do_not_stay_neighbours():
    image = permute(np.arange(20_000), 20_000, 3)
    assert abs(np.corrcoef(image[1:], image[:-1])[0, 1]) < 0.03
    assert abs(np.corrcoef(image, np.arange(20_000))[0, 1]) < 0.03


def test_what_a_seed_means_never_changes():
    assert mix(np.arange(2), 0).tolist() == [12035550249420947055, 6791897765849424158]
    assert permute(np.arange(8), 8, 0).tolist() == [2, 4, 1, 5, 3, 6, 0, 7]
    assert draw(1000, 7, 1) == 692


def test_every_key_matters():
    base = permute(np.arange(64), 64, 1, 2).tolist()
    for keys in [(2, 2), (1, 3), (1,), (2, 1), (1 + 2**64, 2), (-1, 2)]:
        assert permute(np.arange(64), 64, *keys).tolist() != base
