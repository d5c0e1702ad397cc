"""Measurements: ops, training, prefill, decoding and first use, each beside its floor and its peers."""

from milonga.bench.figures import Figure, lines, number
from milonga.bench.ops import OpRow, bench_ops
from milonga.bench.result import BenchResult

__all__ = ["BenchResult", "Figure", "OpRow", "bench_ops", "lines", "number"]
