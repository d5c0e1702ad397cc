"""Which machine and which versions a figure was taken with."""

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_CPUINFO, _MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
_SHOWN = ("torch", "numba", "numpy", "triton")


@dataclass(frozen=True)
class Machine:
    """What a reader needs to know to judge a time."""

    cpu: str
    cores: int  # that this process may use
    threads: int  # that torch uses
    gpu: str | None
    system: str
    python: str
    packages: dict[str, str]

    def to_json(self) -> dict[str, object]:
        """The fields, JSON-ready."""
        return asdict(self)


def describe_machine() -> Machine:
    """This machine, as far as it tells."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return Machine(
        cpu=_cpu_model(),
        cores=_cores(),
        threads=torch.get_num_threads(),
        gpu=gpu,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        packages={name: found for name in ("milonga", *_SHOWN) if (found := _version(name))},
    )


def available_bytes(device: torch.device) -> float:
    """Memory that new tensors on `device` may take; infinite where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if _MEMINFO.is_file():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    return float("inf")


def _cpu_model() -> str:
    if _CPUINFO.is_file():
        for line in _CPUINFO.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine() or "unknown processor"


def _cores() -> int:
    affinity = vars(os).get("sched_getaffinity")
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
