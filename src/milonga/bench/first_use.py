"""`milonga bench first-use`: what compiling costs the first process on a machine, and what it costs every later one.

A fresh process runs something twice and says how much longer the first time took. It does so with empty caches of
compiled kernels (cold), then once more with the caches that it filled (warm). No cache of the user's is touched.

PyTorch imports its own compiler when a process makes its first optimizer, whether anything is compiled or not. For
training that import is done before, and shown by itself; ops and a prefill go without.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from milonga.bench import demands
from milonga.bench.cases import OPS
from milonga.bench.demands import CHIP
from milonga.bench.figures import Figure
from milonga.bench.models import STUDY, study_model, training_shape
from milonga.bench.ops import DTYPES
from milonga.bench.result import Bar, Bars, BenchResult, Progress, Table, silent
from milonga.bench.timing import seconds
from milonga.bench.train import step_of
from milonga.errors import UserError
from milonga.evaluation.decoding import measure_prefill, random_network

PARTS = ("ops", "train", "prefill")
# Where each compiler keeps what it made.
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "NUMBA_CACHE_DIR")
_LONGEST = 900.0  # seconds
_COMPILER = "torch._dynamo"
_IMPORT = f"import {_COMPILER}, not counted"
_NOTES = [
    "processes of their own, with cache folders of their own that are empty at first and removed at the end",
    f"{_COMPILER} is imported by PyTorch with the first optimizer made, compiled or not: who trains waits for it too",
]


def parse_parts(names: str | None) -> list[str]:
    """The parts of a list such as `ops,train`; all for None. A part `ops:scan+conv` is those ops alone.

    Raises:
        UserError: if one is not known.
    """
    if names is None:
        return list(PARTS)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        kind, _, ops = name.partition(":")
        wrong = [op for op in ops.split("+") if op not in OPS] if ops else []
        if kind not in PARTS or (ops and kind != "ops") or wrong:
            raise UserError(f"--what: no part {name!r}; choose from {', '.join(PARTS)}, or ops:scan+conv for some ops")
    if not wanted:
        raise UserError(f"--what: choose from {', '.join(PARTS)}")
    return wanted


def _runs(part: str, device: torch.device, dtype: torch.dtype, compile_: bool) -> dict[str, Callable[[], object]]:
    """What a process runs twice: name -> one run."""
    kind, _, chosen = part.partition(":")
    if kind == "train":
        name = "samba-421m" if device.type == "cuda" else "byte-samba-small"
        shape = training_shape(name)
        precision = "bf16" if dtype == torch.bfloat16 else "fp32"
        return {f"train {name}": step_of(shape, device, precision, compile_)[0]}
    if kind == "prefill":
        small = device.type != "cuda"
        network = random_network(study_model("samba", small=small), device, dtype)
        length = 256 if small else 4096
        return {f"prefill {'small samba' if small else STUDY['samba']}": lambda: _prefill(network, length)}
    made: dict[str, Callable[[], object]] = {}
    for op in [OPS[name] for name in chosen.split("+")] if chosen else OPS.values():
        case = op.build(op.shape((op.on_gpu if device.type == "cuda" else op.on_cpu)[0]), device, dtype)

        def both(case: Any = case) -> object:
            out = case.ours.run(*case.ours.leaves)
            # a number, as training has: for gradients that are given PyTorch would import SymPy first
            return torch.autograd.grad(out.square().mean(), case.ours.leaves)

        made[f"op {op.name}"] = both
    return made


def _prefill(network: Any, length: int) -> object:
    return measure_prefill(network, length, 1, repeats=1)


def child(part: str, device_name: str, dtype_name: str, compile_: bool) -> dict[str, float]:
    """In a fresh process: -> seconds that the first run of each took beyond the second; for training the import too."""
    device = torch.device(device_name)
    extra = {}
    if part == "train":
        began = time.perf_counter()
        import_module(_COMPILER)
        extra[_IMPORT] = time.perf_counter() - began
    for name, run in _runs(part, device, DTYPES[dtype_name], compile_).items():
        first = seconds(run, device)
        extra[name] = max(0.0, first - seconds(run, device))
    return extra


def _process(part: str, device: torch.device, dtype: str, compile_: bool, folder: Path) -> dict[str, Any]:
    """-> extra: {what: seconds}, process: seconds of the whole process, files: in the caches after it."""
    places = {name: str(folder / name.lower()) for name in CACHES}
    options = [part, str(device), dtype, str(int(compile_))]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "milonga.bench.first_use", *options],
        env=os.environ | places,
        capture_output=True,
        text=True,
        timeout=_LONGEST,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"first-use: the process that ran {part} failed: {last}")
    took = time.perf_counter() - began
    files = sum(path.is_file() for path in folder.rglob("*"))
    return {"extra": json.loads(done.stdout.splitlines()[-1]), "process": took, "files": files}


def bench_first_use(
    parts: Sequence[str],
    device: torch.device,
    dtype: str,
    *,
    compile_: bool,
    progress: Progress = silent,
) -> BenchResult:
    """Run each part in a process with empty caches, and in another with the caches that the first left."""
    rows: list[dict[str, Any]] = []
    for index, part in enumerate(parts):
        with tempfile.TemporaryDirectory(prefix="milonga-first-use-") as folder:
            for number, caches in enumerate(("cold", "warm")):
                progress(2 * index + number, 2 * len(parts), f"{part}: a process with {caches} caches compiles")
                got = _process(part, device, dtype, compile_, Path(folder))
                for what, extra in got["extra"].items():
                    rows.append({"part": part, "what": what, "caches": caches, "seconds": extra})
                total = sum(seconds_ for what, seconds_ in got["extra"].items() if what != _IMPORT)
                whole = {"process_seconds": got["process"], "cache_files": got["files"]}
                rows.append({"part": part, "what": "all", "caches": caches, "seconds": total} | whole)
    progress(2 * len(parts), 2 * len(parts), "")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return BenchResult(
        "first-use",
        {"parts": list(parts), "device": str(device), "dtype": dtype, "compile": compile_},
        rows,
        figures_of(rows, gpu),
        [_table(rows, f"First use on {gpu or 'the CPU'}: seconds that the first run takes beyond the second")],
        _plots(rows),
        notes=_NOTES if "train" in parts else _NOTES[:1],
    )


def figures_of(rows: Sequence[dict[str, Any]], gpu: str | None) -> list[Figure]:
    """What compiling all of a part takes, cold and warm."""
    made = []
    for row in rows:
        if row["what"] == "all":
            bound = demands.FIRST_USE_SECONDS[row["caches"]] if gpu is not None and CHIP in gpu else None
            what = f"first use of {row['part']}, {row['caches']} caches"
            made.append(demands.judged(what, row["seconds"], "s", bound, at_least=False))
    return made


def _by_what(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[str, float]]:
    pairs: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        pairs.setdefault((row["part"], row["what"]), {})[row["caches"]] = row["seconds"]
    return pairs


def _table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    shown = [
        (part, what, f"{both['cold']:.2f}", f"{both['warm']:.2f}") for (part, what), both in _by_what(rows).items()
    ]
    return Table(title, ("part", "what", "cold, s", "warm, s"), shown, right=(2, 3))


def _plots(rows: Sequence[dict[str, Any]]) -> list[Bars]:
    groups = [
        (
            f"{part}: {what}",
            [Bar("cold", max(both["cold"], 1e-3), "other"), Bar("warm", max(both["warm"], 1e-3), "model")],
        )
        for (part, what), both in _by_what(rows).items()
    ]
    return [Bars("First use beyond later ones", "seconds", groups)] if groups else []


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4] == "1")))
