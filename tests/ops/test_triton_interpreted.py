"""The Triton kernels on the CPU, under Triton's interpreter, in processes of their own, two at a time."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
# the longest first
OPS = [
    "selective_scan",
    "decode_step",
    "mamba_piece",
    "speculation",
    "mamba_mixer",
    "causal_conv",
    "window_attention",
    "rms_norm",
    "rotary",
    "selective_scan_gluon",
    "linear_cross_entropy",
    "swiglu",
    "adamw",
]
Done = subprocess.CompletedProcess[str]


def run(op: str) -> Done:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/ops/interpreted_{op}.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def running(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Done]]]:
    """The processes of the tests that were asked for."""
    names = {item.name for item in request.session.items if item.path == request.path}
    asked = [op for op in OPS if f"test_laws_under_the_interpreter[{op}]" in names]
    with ThreadPoolExecutor(2) as pool:
        yield {op: pool.submit(run, op) for op in asked}


def test_every_file_is_run() -> None:
    assert {path.stem for path in FOLDER.glob("interpreted_*.py")} == {f"interpreted_{op}" for op in OPS}


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: pip install 'milonga[test]' on Linux")
@pytest.mark.parametrize("op", OPS)
def test_laws_under_the_interpreter(op: str, running: dict[str, Future[Done]]) -> None:
    result = running[op].result()
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
