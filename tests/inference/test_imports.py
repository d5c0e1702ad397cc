"""What a session loads: PyTorch's compiler takes a second or more to import, and nothing here needs it."""

import subprocess
import sys

from milonga.models.pretrained import save_weights
from tests.inference.helpers import opinionated

READ = """
import sys, milonga
session = milonga.load(sys.argv[1]).session()
session.feed("once upon a time")
text = "".join(session.generate(5))
print([name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules])
"""


def test_a_session_does_not_load_the_compiler(tmp_path):
    path = tmp_path / "model.safetensors"
    save_weights(opinionated().network, path)
    done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
