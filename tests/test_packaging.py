"""What is installed, and the folder named `kernels` that must never shadow the package of that name."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet"]
    subprocess.run([*pip, "--no-build-isolation", "--no-deps", "-w", folder, ROOT], check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl"))).namelist()


def test_the_wheel_holds_only_sparseft(wheel):
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == {"sparseft"}


def test_the_wheel_holds_every_module_and_the_extension(wheel):
    modules = {f"sparseft/{path.relative_to(ROOT / 'sparseft')}" for path in (ROOT / "sparseft").rglob("*.py")}
    modules |= {f"sparseft/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert modules <= set(wheel)
    assert "sparseft/py.typed" in wheel
    assert any(name.startswith("sparseft/_C.") for name in wheel)


def test_transformers_imports_from_the_repositorys_root():
    """`python -c` puts the current folder on sys.path, so this sees the `kernels` folder first."""
    script = "from transformers import Trainer, AutoModelForSequenceClassification; import sparseft; print('fine')"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "fine", run.stderr


def test_nothing_puts_the_root_on_the_path():
    assert (ROOT / "kernels" / "__init__.py").exists(), "editable installs map a folder only if it is a package"
    assert not (ROOT / "tests" / "__init__.py").exists(), "pytest would put the root on sys.path"
    assert ROOT not in {Path(entry or ".").resolve() for entry in sys.path}
