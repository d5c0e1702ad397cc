"""What a model can do, as numbers and pictures."""

from milonga.evaluation.perplexity import COMMANDS, COMPRESSORS, Bucket, DocumentScore, Perplexity, evaluate_perplexity
from milonga.evaluation.throughput import Throughput, measure_throughput, memory_growth, transformer_cache_bytes

__all__ = [
    "COMMANDS",
    "COMPRESSORS",
    "Bucket",
    "DocumentScore",
    "Perplexity",
    "Throughput",
    "evaluate_perplexity",
    "measure_throughput",
    "memory_growth",
    "transformer_cache_bytes",
]
