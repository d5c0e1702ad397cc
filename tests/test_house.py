"""Rules of the house that no linter knows: read from the source, file by file."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "milonga"
FILES = sorted(SOURCE.rglob("*.py"))
NAMES = [str(path.relative_to(SOURCE)) for path in FILES]
BENCHMARKS = sorted((SOURCE.parents[1] / "benchmarks").glob("*.py"))
every_file = pytest.mark.parametrize(
    "path", [*FILES, *BENCHMARKS], ids=[*NAMES, *(f"benchmarks/{path.name}" for path in BENCHMARKS)]
)
LONGEST = 400  # lines of a file that holds no kernels
FORWARDS = {"forward", "advance", "commit", "commit_"}


def _calls(tree, name):
    return [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == name]


def test_there_is_source_to_read():
    assert {"__init__.py", "errors.py", "segments.py"} <= set(NAMES)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_attribute_is_looked_up_by_a_computed_name_and_no_text_is_run(path):
    tree = ast.parse(path.read_text())
    for call in [*_calls(tree, "getattr"), *_calls(tree, "setattr")]:
        assert isinstance(call.args[1], ast.Constant), f"{path}:{call.lineno}"
    for call in [*_calls(tree, "eval"), *_calls(tree, "exec")]:
        pytest.fail(f"{path}:{call.lineno}")


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_missing_package_is_handled_in_one_file_only(path):
    if path == SOURCE / "ops" / "backend.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler) and node.type is not None:
            caught = ast.unparse(node.type)
            assert "ImportError" not in caught, f"{path}:{node.lineno}"
            assert "ModuleNotFoundError" not in caught, f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_forward_names_all_its_arguments(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name in FORWARDS:
            assert node.args.kwarg is None, f"{path}:{node.lineno}"


def _holds_kernels(path):
    """Kernels are read as a whole, whatever their length."""
    return "kernels" in path.stem or path.stem.startswith("gluon_") or path.parts[-2:] == ("window_attention", "cpu.py")


@every_file
def test_no_file_is_long_but_for_kernels(path):
    lines = len(path.read_text().splitlines())
    assert lines <= LONGEST or _holds_kernels(path), f"{path}: {lines} lines"


@every_file
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text())), path
