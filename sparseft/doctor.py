"""Which implementation serves each op on each device, and how to get what is missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import shutil
from typing import Any

import torch

from sparseft import ops
from sparseft.products import prefer_onednn

_PACKAGES = ("sparseft", "torch", "triton", "transformers", "accelerate", "datasets", "safetensors", "numpy")


def report() -> dict[str, Any]:
    """Return versions, devices, who serves each op where, and what is missing with its remedy, as plain values.

    "ok" says whether every op is compiled for the CPU.
    """
    compiled = importlib.util.find_spec("sparseft._C") is not None
    build = importlib.import_module("sparseft._C").build_info() if compiled else {}
    cuda = torch.cuda.is_available()
    products = "oneDNN" if prefer_onednn() else "torch's default"
    devices = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads, fp32 products by {products}"}
    if cuda:
        devices["cuda"] = torch.cuda.get_device_name()
    return {
        "ok": all(served["cpu"] == "c++" for served in ops.SERVED_BY.values()),
        "ops": {name: {device: served[device] for device in served} for name, served in ops.SERVED_BY.items()},
        "devices": devices,
        "versions": {"python": platform.python_version(), **_versions()},
        "build": {key: value for key, value in build.items() if key != "ops"},
        "missing": _missing(build, cuda),
    }


def table(found: dict[str, Any]) -> str:
    """Return a report as text for a terminal."""
    width = max(map(len, found["ops"])) + 2
    lines = [f"{'op':{width}}{'cpu':12}{'cuda':12}"]
    lines += [f"{name:{width}}{served['cpu']:12}{served['cuda']:12}" for name, served in found["ops"].items()]
    lines.append("")
    for title in ("devices", "versions", "build"):
        lines += [f"{title}: " + (", ".join(f"{key} {value}" for key, value in found[title].items()) or "none")]
    lines += [f"missing: {gap['what']}: {gap['why']}; {gap['remedy']}" for gap in found["missing"]]
    return "\n".join(lines)


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _missing(build: dict[str, Any], cuda: bool) -> list[dict[str, str]]:
    gaps = []

    def gap(what: str, why: str, remedy: str) -> None:
        gaps.append({"what": what, "why": why, "remedy": remedy})

    slow = [name for name, served in ops.SERVED_BY.items() if served["cpu"] != "c++"]
    if slow:
        gap(
            "compiled ops for the CPU",
            f"{', '.join(slow)} run in plain PyTorch",
            "install a C++ compiler, then `pip install --no-build-isolation --force-reinstall --no-deps .`",
        )
    if cuda and not (build.get("ops") or {}).get("cuda"):
        nvcc = shutil.which("nvcc")
        gap(
            "CUDA C++ ops",
            f"the build had no nvcc and CUDA torch{f', though nvcc is now at {nvcc}' if nvcc else ''}",
            "with the CUDA toolkit of torch's version: `SPARSEFT_CUDA=1 pip install --no-build-isolation "
            "--force-reinstall --no-deps .`",
        )
    if cuda and importlib.util.find_spec("triton") is None:
        gap("triton", "ops without CUDA C++ run in plain PyTorch on the GPU", "`pip install triton`")
    for package in ("transformers", "accelerate", "datasets"):
        if importlib.util.find_spec(package) is None:
            gap(package, "`sparseft train`, `select` and `merge` need it", "`pip install 'sparseft[train]'`")
    return gaps
