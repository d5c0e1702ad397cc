"""The Triton kernels on the CPU, under Triton's interpreter, in a process of their own."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: pip install 'milonga[test]' on Linux")
@pytest.mark.parametrize(
    "op",
    [
        "selective_scan",
        "selective_scan_gluon",
        "causal_conv",
        "rms_norm",
        "swiglu",
        "rotary",
        "window_attention",
        "linear_cross_entropy",
    ],
)
def test_laws_under_the_interpreter(op: str) -> None:
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/ops/interpreted_{op}.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=folder.parents[1], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
