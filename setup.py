"""Build the extension sparseft._C: C++ always, CUDA where nvcc and a CUDA torch are there. The rest: pyproject.toml.

SPARSEFT_CUDA=0 leaves the CUDA part out, SPARSEFT_CUDA=1 insists on it.
"""

import os
import re
import subprocess
from pathlib import Path

import pybind11
import torch
from setuptools import setup
from torch.utils import cpp_extension
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

CPU_SOURCES = [
    "csrc/module.cpp",
    "csrc/cpu/adamw.cpp",
    "csrc/cpu/attention.cpp",
    "csrc/cpu/delta_swap.cpp",
    "csrc/cpu/fisher_linear.cpp",
    "csrc/cpu/fisher_segments.cpp",
    "csrc/cpu/gather.cpp",
    "csrc/cpu/layer_norm_backward.cpp",
    "csrc/cpu/lion.cpp",
    "csrc/cpu/outer_at.cpp",
    "csrc/cpu/outer_product.cpp",
    "csrc/cpu/selected_grad.cpp",
    "csrc/cpu/sgd.cpp",
    "csrc/cpu/topk.cpp",
    "csrc/host/lazy_greedy.cpp",
]
CUDA_SOURCES = [
    "csrc/cuda/adamw.cu",
    "csrc/cuda/delta_swap.cu",
    "csrc/cuda/gather.cu",
    "csrc/cuda/lion.cu",
    "csrc/cuda/sgd.cu",
]
# the oldest libtorch whose stable ABI the ops use; a header outside that ABI does not compile with it
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"


def cuda_home() -> Path | None:
    """Return the folder of the CUDA toolkit: what torch found, or what nvcc says where that is but a wrapper of it."""
    if cpp_extension.CUDA_HOME is None:
        return None
    home = Path(cpp_extension.CUDA_HOME)
    nvcc = home / "bin" / "nvcc"
    if not nvcc.exists() or (home / "include" / "cuda_runtime_api.h").exists():
        return home if nvcc.exists() else None
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    found = re.search(r"^#\$ _HERE_=(.+)$", plan, re.MULTILINE)
    return Path(found[1]).parent if found else home


def with_cuda() -> bool:
    wanted = os.environ.get("SPARSEFT_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"SPARSEFT_CUDA must be 0 or 1, got {wanted!r}; leave it unset to build what can be built")
    missing = None
    if torch.version.cuda is None:
        missing = f"a CUDA build of torch, got torch {torch.__version__}"
    elif cuda_home() is None:
        missing = "nvcc, which is neither on the PATH nor in CUDA_HOME"
    if wanted == "1" and missing:
        raise SystemExit(f"SPARSEFT_CUDA=1 needs {missing}; install it, or set SPARSEFT_CUDA=0")
    return missing is None and wanted != "0"


def extension():
    cxx = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall", TARGET]
    # before torch's own copy of pybind11, which some versions of torch bar from code for the stable ABI
    include = [pybind11.get_include()]
    if not with_cuda():
        return CppExtension("sparseft._C", CPU_SOURCES, include_dirs=include, extra_compile_args={"cxx": cxx})
    cpp_extension.CUDA_HOME = str(cuda_home())
    # machine code for 8.0 to 9.x, and an intermediate form that drivers of newer GPUs translate
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    nvcc = ["-O3", "-std=c++17", "-Xcompiler=-fvisibility=hidden", "-DUSE_CUDA", TARGET]
    flags = {"cxx": [*cxx, "-DUSE_CUDA"], "nvcc": nvcc}
    return CUDAExtension("sparseft._C", CPU_SOURCES + CUDA_SOURCES, include_dirs=include, extra_compile_args=flags)


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
