"""The wheel: what is in it, and that it works in a fresh environment and an empty folder."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import milonga

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--no-build-isolation", "--no-index", "--wheel-dir", folder, ROOT], check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A fresh environment's `bin` folder: the wheel installed, its dependencies borrowed from the current environment.

    The borrowed folder comes after the environment's own, and an editable installation in it is not followed.
    """
    folder = tmp_path_factory.mktemp("fresh") / "env"
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    scheme = {"base": str(folder), "platbase": str(folder)}
    python = Path(sysconfig.get_path("scripts", "venv", vars=scheme)) / "python"
    own = Path(sysconfig.get_path("purelib", "venv", vars=scheme))
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, "--no-deps", "--no-index", wheel], check=True)
    return python.parent


def _run(installed, command, folder, **keywords):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [installed / command[0], *command[1:]], cwd=folder, env=environment, capture_output=True, text=True, **keywords
    )


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names}
    information = f"milonga-{milonga.__version__}.dist-info"
    assert top == {"milonga", information}
    for path in (ROOT / "src" / "milonga").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert f"milonga/{path.relative_to(ROOT / 'src' / 'milonga').as_posix()}" in names
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".nbi", ".nbc"))]
    assert "milonga/py.typed" in names
    assert "milonga/recipes/demo.yaml" in names
    assert f"{information}/licenses/LICENSE" in names


def test_the_wheel_is_pure_and_small(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel.stat().st_size < 8 * 2**20


def test_the_metadata_say_what_is_needed(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = Parser().parsestr(archive.read(f"milonga-{milonga.__version__}.dist-info/METADATA").decode())
    assert metadata["Version"] == milonga.__version__
    assert metadata["License-Expression"] == "MIT"
    assert {part.strip() for part in metadata["Requires-Python"].split(",")} == {">=3.11", "<3.14"}
    base = {line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert "torch>=2.9" in base
    assert not [line for line in base if line.startswith(("transformers", "datasets", "fastapi", "tensorboard"))]


def test_the_constraints_pin_every_dependency_exactly():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert pins["torch"] == "2.13.0"
    assert not [version for version in pins.values() if "+" in version]
    names = {name.lower().replace("_", "-") for name in pins}
    assert {"numba", "numpy", "pydantic", "typer", "safetensors", "hatchling", "pytest", "ruff", "mkdocs"} <= names


def test_version_in_an_empty_folder(installed, tmp_path):
    done = _run(installed, ["milonga", "--version"], tmp_path, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert milonga.__version__ in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_installed_package_is_the_wheels(installed, tmp_path):
    done = _run(installed, ["python", "-c", "import milonga; print(milonga.__file__)"], tmp_path, timeout=60)
    assert Path(done.stdout.strip()).is_relative_to(installed.parent)


@pytest.mark.timeout(600)
def test_five_steps_of_the_demo_in_an_empty_folder(installed, tmp_path):
    command = ["milonga", "train", "demo", "--out", "run", "--set", "training.steps=5"]
    done = _run(installed, command, tmp_path, timeout=540)
    assert done.returncode == 0, done.stderr
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in metrics) == 5
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    read = "import milonga; s = milonga.load('run').session(); s.feed(b'It was'); print(s.position)"
    done = _run(installed, ["python", "-c", read], tmp_path, timeout=120)
    assert done.stdout.strip() == "6", done.stderr
