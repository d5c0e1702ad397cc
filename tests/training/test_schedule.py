"""The learning rate at each step."""

import math
from itertools import pairwise

import pytest

from milonga.training import ScheduleConfig, learning_rate


def _rates(steps, **settings):
    return [learning_rate(step, steps, 2.0, ScheduleConfig(**settings)) for step in range(steps)]


def test_warm_up_is_linear_and_reaches_the_peak():
    rates = _rates(100, warmup_steps=10, decay="constant")
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10:] == [2.0] * 90


def test_it_may_start_from_zero():
    rates = _rates(100, warmup_fraction=0.1, from_zero=True, decay="constant")
    assert rates[:11] == pytest.approx([0.2 * step for step in range(11)])


def test_cosine_goes_from_the_peak_to_a_tenth():
    rates = _rates(1000, warmup_steps=0, final_fraction=0.1)
    for step in (0, 250, 500, 999):
        assert rates[step] == pytest.approx(0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi * step / 1000)))
    assert all(later < earlier for earlier, later in pairwise(rates))


def test_linear_over_the_last_part_is_a_trapezoid():
    rates = _rates(100, warmup_steps=20, decay="linear", decay_fraction=0.25, final_fraction=0.0)
    assert rates[20:81] == [2.0] * 61
    assert rates[81:] == pytest.approx([2.0 * (1 - (step - 80) / 20) for step in range(81, 100)])


def test_a_warm_up_as_long_as_the_run_and_a_run_of_one_step():
    assert _rates(5, warmup_steps=5) == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert _rates(1, warmup_steps=0) == [2.0]
    assert learning_rate(7, 5, 2.0, ScheduleConfig(warmup_steps=0, final_fraction=0.5)) == 1.0


def test_the_samba_recipe_warms_up_for_95_of_9536_steps():
    schedule = ScheduleConfig(warmup_fraction=0.01, from_zero=True)
    assert schedule.warmup(9536) == 95
    assert learning_rate(0, 9536, 4e-4, schedule) == 0
    assert learning_rate(95, 9536, 4e-4, schedule) == pytest.approx(4e-4)
    assert learning_rate(9535, 9536, 4e-4, schedule) == pytest.approx(4e-5, rel=1e-4)
