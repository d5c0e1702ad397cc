"""The shapes in the annotations of layers and models are true: checked by beartype while laws run, in tests only."""

import subprocess
import sys


def test_annotated_shapes_hold() -> None:
    """In a process of its own: the checks are put in at import, and a compiler cannot look through them."""
    laws = "test_split or test_packed_is_separate or test_commit_keeps_steps or test_losses"
    packages = "--jaxtyping-packages=milonga.layers,milonga.models,beartype.beartype"
    options = ["-q", "-x", "--tb=short", "-p", "no:cacheprovider", "--hypothesis-profile=quick", packages]
    command = [sys.executable, "-m", "pytest", *options, "tests/laws", "-k", laws]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout
