"""Measurements: ops, training, prefill, decoding and first use, each beside its floor and its peers."""

from milonga.bench.decode import bench_decode
from milonga.bench.figures import Figure, lines, number
from milonga.bench.first_use import bench_first_use
from milonga.bench.ops import bench_ops
from milonga.bench.prefill import bench_prefill
from milonga.bench.result import BenchResult
from milonga.bench.train import bench_train

__all__ = [
    "BenchResult",
    "Figure",
    "bench_decode",
    "bench_first_use",
    "bench_ops",
    "bench_prefill",
    "bench_train",
    "lines",
    "number",
]
