"""`milonga doctor`: what this installation has, what each op runs on, and whether the results are right."""

import platform
from importlib import metadata

import torch
from llvmlite import binding as llvm

from milonga import __version__
from milonga.cli import console
from milonga.cli.selftest import Result, cases, check
from milonga.evaluation.machine import describe_machine
from milonga.ops.backend import COMPILED, OPS, choice, kernels

PACKAGES = ("torch", "numba", "triton", "numpy", "pydantic", "safetensors")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Of the many instruction sets, those that decide how fast the CPU kernels are.
VECTORS = ("sse4.2", "avx", "avx2", "fma", "avx512f", "avx512bf16", "amx-bf16", "neon", "sve", "sve2")


def compile_kernels() -> None:
    """Compile the CPU kernels of every op that are not yet in Numba's cache, with progress on stderr."""
    with console.progress("compiling the CPU kernels", total=len(COMPILED), unit="ops") as bar:
        for index, op in enumerate(COMPILED):
            bar.update(index, op)
            kernels(op, "cpu").compile_kernels()
        bar.update(len(COMPILED))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, object]:
    """The machine and the versions, as `--json` prints them."""
    here, present = describe_machine(), llvm.get_host_cpu_features()
    return {
        "milonga": __version__,
        "python": here.python,
        "packages": {package: _version(package) for package in PACKAGES},
        "system": platform.platform(),
        "cpu": here.cpu,
        "cores": here.cores,
        "threads": here.threads,
        "instruction_sets": [name for name in VECTORS if present.get(name)],
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def devices() -> list[str]:
    """The kinds of devices that ops can run on here."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def backends() -> dict[str, dict[str, str]]:
    """Of each op: `device dtype` -> the backend that `auto` takes."""
    places = [(device, dtype) for device in devices() for dtype in DTYPES]
    return {
        op: {f"{device} {_name(dtype)}": choice(op, "auto", device, dtype) for device, dtype in places} for op in OPS
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _print(facts: dict[str, object], chosen: dict[str, dict[str, str]], results: list[Result]) -> None:
    packages = facts["packages"]
    assert isinstance(packages, dict)
    sets, gpus = facts["instruction_sets"], facts["gpus"]
    assert isinstance(sets, list) and isinstance(gpus, list)
    rows: list[tuple[str, object]] = [("milonga", facts["milonga"]), ("python", facts["python"])]
    rows += [(package, version or "not installed") for package, version in packages.items()]
    rows += [
        ("system", facts["system"]),
        ("CPU", f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads"),
        ("instruction sets", " ".join(sets) or "none of those that matter here"),
        ("GPUs", ", ".join(gpus) or "none"),
    ]
    console.stdout.print(console.table("Installation", ("what", "which"), rows))
    headings = list(next(iter(chosen.values())))
    console.stdout.print(
        console.table("Backends", ("op", *headings), [(op, *taken.values()) for op, taken in chosen.items()])
    )
    shown = [
        (
            result.op,
            result.device,
            result.backend,
            f"{result.forward_error:.1e}",
            f"{result.gradient_error:.1e}",
            f"{result.bound:.0e}",
            f"{result.seconds * 1e3:.2f} ms",
            "ok" if result.passed else "WRONG",
        )
        for result in results
    ]
    headings = ["op", "device", "backend", "error", "of gradients", "bound", "time", ""]
    title = "Self-test in float32 against the definition in float64 (relative RMS of the worst tensor)"
    console.stdout.print(console.table(title, headings, shown, right=(3, 4, 5, 6)))


def run_doctor(compile_: bool, json_: bool) -> int:
    """Print what there is and test it; the exit code: 1 if a self-test fails."""
    if compile_:
        compile_kernels()
        if json_:
            console.print_json({"compiled": list(COMPILED)})
        return 0
    results = []
    tests = [(case, device) for device in devices() for case in cases()]
    with console.progress("testing the ops", total=len(tests), unit="ops") as bar:
        for case, device in tests:
            bar.update(len(results), f"{case.op} on {device}")
            results.append(check(case, device))
        bar.update(len(results))
    facts, chosen = machine(), backends()
    passed = all(result.passed for result in results)
    if json_:
        tested = [vars(result) | {"passed": result.passed} for result in results]
        console.print_json(facts | {"backends": chosen, "self_test": tested, "passed": passed})
    else:
        _print(facts, chosen, results)
    return 0 if passed else 1
