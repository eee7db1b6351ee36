"""Imports point one way, and starting up is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sparseft
from sparseft.selection import METHODS

PACKAGE = Path(sparseft.__file__).parent
KERNELS = Path(__file__).resolve().parent.parent / "kernels"

# a room -> the rooms of the house it may call; every room may call itself
MAY_CALL = {
    "low_bits": set(),
    "reference_optim": {"index_lists", "low_bits"},
    "index_lists": set(),
    "reference": {"index_lists", "reference_optim"},
    "kernels": {"index_lists", "low_bits", "reference", "reference_optim"},
    "ops": {"index_lists", "reference"},
    "files": {"index_lists"},
    "pictures": set(),
    "products": set(),
    "attention": {"ops", "products"},
    "entries": {"index_lists"},
    "mask": {"entries", "files", "index_lists"},
    "compact": {"entries", "index_lists", "mask", "ops", "products"},
    "testing_optim": {"index_lists", "low_bits"},
    "testing": {"index_lists", "ops", "reference", "testing_optim"},
    "fisher": {"attention", "entries", "ops", "products", "reference", "mask", "files"},
    "optim": {"entries", "index_lists", "low_bits", "ops", "mask"},
    "design_space": {"files", "pictures", "selection"},
    "selection": {"entries", "files", "fisher", "index_lists", "mask", "ops", "pictures", "reference"},
    "schedules": {"entries", "index_lists", "low_bits", "mask", "ops", "optim", "selection"},
    "delta": {"mask", "files", "ops"},
    "doctor": {"ops", "products"},
    "data": {"files", "fisher"},
    "workers": {"delta", "entries", "fisher", "mask", "selection"},
}
LEAVES = {"integrations", "cli", "__init__", "__main__"}
FOREIGN = {"transformers", "datasets", "accelerate", "peft", "trl", "lightning"}


def sources():
    files = [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in PACKAGE.rglob("*.py")]
    return files + [("kernels", path) for path in KERNELS.rglob("*.py")]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(("room", "path"), sources(), ids=lambda value: getattr(value, "stem", value))
def test_imports_point_one_way(room, path):
    for name in imported(path):
        parts = name.split(".")
        if parts[0] in FOREIGN:
            assert room in {"integrations", "cli"}, f"{path} imports {name}: only integrations may"
        if parts[0] == "sparseft" and len(parts) > 1 and room not in LEAVES:
            inner = (PACKAGE / f"{parts[1]}.py").exists() or (PACKAGE / parts[1]).is_dir() or parts[1] == "kernels"
            if inner and parts[1] != room:
                assert parts[1] in MAY_CALL[room], f"{path}: {room} must not import {parts[1]}"


def test_methods_never_import_each_other():
    methods = set(METHODS)
    for path in (PACKAGE / "selection").rglob("*.py"):
        if path.stem in methods:
            assert not methods & {name.rpartition("selection.")[2] for name in imported(path) if "selection." in name}


def test_importing_is_light():
    """Neither triton nor a heavy library is loaded, and no GPU is touched."""
    script = (
        "import sys, sparseft, torch; "
        f"print([name for name in {sorted(FOREIGN | {'triton'})} if name in sys.modules], torch.cuda.is_initialized())"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    plain = subprocess.run(
        [sys.executable, "-c", script.replace("sparseft, ", "")], capture_output=True, text=True, check=True
    )
    assert run.stdout == plain.stdout
    assert run.stdout.strip().endswith("False")
