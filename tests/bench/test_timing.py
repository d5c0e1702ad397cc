"""Timing: turns, repeats, failures."""

import time

import torch

from milonga.bench.timing import Failure, Timing, measure, warmed

CPU = torch.device("cpu")


def test_calls_take_turns_and_the_median_counts():
    order = []

    def slow():
        order.append("slow")
        time.sleep(0.02)

    def quick():
        order.append("quick")
        time.sleep(0.005)

    told = []
    got = measure({"slow": slow, "quick": quick}, CPU, budget=0.06, least=3, most=6, report=told.append)
    assert told == ["slow", "quick"]
    assert isinstance(got["slow"], Timing)
    assert isinstance(got["quick"], Timing)
    assert 0.02 <= got["slow"].best <= got["slow"].median
    assert got["slow"].median > got["quick"].median >= 0.005
    assert got["slow"].repeats == 3
    assert 3 <= got["quick"].repeats <= 6
    assert order[6:12] == ["slow", "quick"] * 3, "three runs of each to warm up, then in turns"
    assert got["slow"].peak_bytes is None


def test_what_fails_is_a_line_and_the_others_go_on():
    def broken():
        raise RuntimeError("no such kernel\nand a long story")

    got = measure({"broken": broken, "fine": lambda: None}, CPU, budget=0, least=2)
    assert got["broken"] == Failure("RuntimeError: no such kernel")
    assert isinstance(got["fine"], Timing)


def test_a_full_memory_is_said():
    def greedy():
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert warmed(greedy, CPU) == Failure("out of memory")
