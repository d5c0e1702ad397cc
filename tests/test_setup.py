"""tools/setup.sh and the Makefile: what cannot work ends with one clear line and exit code 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAKE_VARIABLES = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "VENV", "PYTHON", "TORCH_INDEX"}


def _environment(**changes):
    kept = {name: value for name, value in os.environ.items() if name not in MAKE_VARIABLES}
    return kept | {name: str(value) for name, value in changes.items()}


def _setup(venv, **changes):
    command = ["/bin/sh", str(ROOT / "tools" / "setup.sh"), str(venv)]
    return subprocess.run(command, env=_environment(**changes), capture_output=True, text=True, timeout=120)


def _interpreter(path, patch):
    """A real Python that has something taken away: `patch` runs before the code given with -c."""
    runner = f"import sys; code = sys.argv[2]; {patch}; exec(code)"
    path.write_text(f"#!/bin/sh\nexec '{sys.executable}' -I -c '{runner}' \"$@\"\n")
    path.chmod(0o755)
    return path


def _old_python(path):
    return _interpreter(
        path, 'import platform; platform.python_version = lambda: "3.10.4"; sys.version_info = (3, 10, 4)'
    )


def _python_without_venv(path):
    return _interpreter(path, 'sys.modules["ensurepip"] = None')


def test_an_unsupported_python_is_named(tmp_path):
    done = _setup(tmp_path / "env", PYTHON=_old_python(tmp_path / "python"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "3.10.4" in done.stderr
    assert "3.11, 3.12 or 3.13 is needed" in done.stderr
    assert not (tmp_path / "env").exists()


def test_a_missing_venv_module_is_named(tmp_path):
    done = _setup(tmp_path / "env", PYTHON=_python_without_venv(tmp_path / "python"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no venv module" in done.stderr
    assert "python3-venv" in done.stderr
    assert not (tmp_path / "env").exists()


@pytest.fixture
def narrow_path(tmp_path):
    """A PATH with the few tools that the script needs and no Python at all."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("dirname", "ls", "rm"):
        source = next(p / tool for p in map(Path, os.environ["PATH"].split(os.pathsep)) if (p / tool).exists())
        (folder / tool).symlink_to(source)
    return folder


def test_no_python_at_all(tmp_path, narrow_path):
    done = _setup(tmp_path / "env", PATH=narrow_path)
    assert done.returncode == 2
    assert "found: none" in done.stderr


def test_the_search_goes_on_behind_an_unsupported_python3(tmp_path, narrow_path):
    _old_python(narrow_path / "python3")
    _python_without_venv(narrow_path / "python3.12")
    done = _setup(tmp_path / "env", PATH=narrow_path)
    assert done.returncode == 2
    assert "python3.12 (Python" in done.stderr
    assert "no venv module" in done.stderr


def test_a_folder_that_is_no_environment_is_kept(tmp_path):
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "letter.txt").write_text("dear diary")
    done = _setup(tmp_path / "env", PYTHON=sys.executable)
    assert done.returncode == 2
    assert "is no environment" in done.stderr
    assert (tmp_path / "env" / "letter.txt").read_text() == "dear diary"


def test_an_unfinished_environment_is_made_again_and_a_failing_pip_is_said(tmp_path):
    venv = tmp_path / "env"
    venv.mkdir()
    (venv / "pyvenv.cfg").write_text("home = /nowhere\n")
    done = _setup(
        venv, PYTHON=sys.executable, PIP_NO_INDEX=1, PIP_FIND_LINKS=tmp_path, PIP_CONFIG_FILE=os.devnull, TORCH_INDEX=""
    )
    assert done.returncode == 2
    assert "unfinished, making it again" in done.stderr
    assert "pip could not install" in done.stderr.splitlines()[-1]
    assert (venv / "bin" / "python").exists()


def test_make_hands_the_exit_code_on(tmp_path):
    python = _python_without_venv(tmp_path / "python")
    command = ["make", "-C", str(ROOT), "venv", f"VENV={tmp_path / 'env'}", f"PYTHON={python}"]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "no venv module" in done.stderr


def test_a_second_make_installs_nothing_unless_the_pins_changed(tmp_path):
    (tmp_path / ".milonga-base").touch()
    command = ["make", "-q", "-C", str(ROOT), "venv", f"VENV={tmp_path}"]
    assert subprocess.run(command, env=_environment(), timeout=60).returncode == 0
    os.utime(tmp_path / ".milonga-base", (0, 0))
    assert subprocess.run(command, env=_environment(), timeout=60).returncode == 1


def test_help_lists_every_target_with_a_word():
    done = subprocess.run(
        ["make", "-C", str(ROOT), "-s"], env=_environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    for target in ("demo", "test", "lint", "types", "floors", "laws", "slow", "gpu", "bench", "docs", "wheel", "clean"):
        assert f"make {target}" in done.stdout
