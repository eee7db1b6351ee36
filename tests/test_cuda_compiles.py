"""The CUDA sources compile for every architecture that is shipped. It takes nvcc and torch's headers, and no GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90")


def nvcc() -> str:
    found = shutil.which("nvcc") or (cpp_extension.CUDA_HOME and shutil.which(f"{cpp_extension.CUDA_HOME}/bin/nvcc"))
    if not found:
        pytest.skip("nvcc is not installed: the CUDA sources were not compiled")
    return found


def test_setup_lists_every_source():
    listed = re.findall(r'"(csrc/\S+?\.(?:cpp|cu))"', (ROOT / "setup.py").read_text())
    there = [path for pattern in ("*.cpp", "*/*.cpp", "*/*.cu") for path in (ROOT / "csrc").glob(pattern)]
    assert sorted(listed) == sorted(str(path.relative_to(ROOT)) for path in there)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_compiles_for_every_architecture_without_spills(source: Path, tmp_path: Path):
    target = re.search(r"-DTORCH_TARGET_VERSION=\w+", (ROOT / "setup.py").read_text())
    assert target, "setup.py no longer pins the stable ABI that the sources are compiled against"
    command = [nvcc(), "-c", str(source), "-o", str(tmp_path / "out.o"), "-O3", "-std=c++17", "-Xptxas", "-v"]
    command += ["--threads", "2", "-DUSE_CUDA", target[0]]
    command += [f"-I{path}" for path in cpp_extension.include_paths()]
    for architecture in ARCHITECTURES:
        command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    report = result.stdout + result.stderr
    for architecture in ARCHITECTURES:
        assert f"for 'sm_{architecture}'" in report, f"no kernel was compiled for sm_{architecture}:\n{report}"
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    assert spills, f"the compiler reports no registers:\n{report}"
    assert set(spills) == {"0"}, f"registers spill to memory:\n{report}"
