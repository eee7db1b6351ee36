"""How a figure is made: baselines and implementation in turn, round by round, beside the floor of the machine."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import provenance
import pytest
import torch

from sparseft import ops, products, testing

Call = Callable[[], Any]
# what a core or a GPU fetches from memory at once, in bytes
LINE_BYTES = {"cpu": 64, "cuda": 32}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured: one row of results an implementation."""

    op: str
    shape: str
    density: float | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def backend(self) -> str:
        """Who serves the op: "c++", "triton" or "reference"; "sparseft" for what is more than one op."""
        return ops.SERVED_BY[self.op][self.device] if self.op in ops.SERVED_BY else "sparseft"


@dataclasses.dataclass(frozen=True)
class Floor:
    """The bytes that must be moved (reads and writes) and the operations that must be done, whoever does them."""

    moved: float = 0.0
    flops: float = 0.0

    def seconds(self, case: Case) -> float:
        """Return the time both take at the rates measured on this machine, each hidden behind the other."""
        moving = self.moved / copy_rate(case.device) if self.moved else 0.0
        computing = self.flops / matmul_rate(case.device, case.dtype) if self.flops else 0.0
        return max(moving, computing)


def on_devices(shapes: Mapping[str, list[tuple[Any, ...]]]) -> list[Any]:
    """Return (device, *shape) for `pytest.mark.parametrize`, for the devices that are here."""
    return [
        pytest.param(device, *shape, id="-".join(str(part) for part in (device, *shape)).replace("torch.", ""))
        for device in testing.devices()
        for shape in shapes[device]
    ]


def compare(
    benchmark: Any,
    case: Case,
    ours: Call,
    baselines: Mapping[str, Call],
    *,
    rounds: int,
    warm: int = 0,
    floor: Floor | None = None,
    peaks: Mapping[str, int | None] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> None:
    """Time an implementation and its baselines in turn, `rounds` times each. What is timed must be checked before.

    Load on a shared machine then falls on all of them alike, and each starts with the caches as the others left them,
    as a step does after a backward pass. The heap too: what one gives back to the system, the next must take again, so
    baselines begin with another one every round. What a call returns is dropped after its time is taken.

    Args:
        benchmark: pytest-benchmark's fixture.
        case: what is measured.
        ours: the implementation.
        baselines: name -> call; ratios are to the first.
        rounds: number of measurements of each.
        warm: how often to call each untimed before it is timed, so that the caches hold what it left there.
        floor: what must be moved and computed.
        peaks: name -> peak bytes above what was there before the call; ours under the case's backend.
        sizes: name -> bytes of what comes out, ours under the case's backend; gets rows of its own.
    """
    if case.backend == "reference":
        raise RuntimeError(f"{case.op} must be compiled for {case.device} to be measured; build it: pip install -e .")
    seconds: dict[str, list[float]] = {name: [] for name in baselines}
    order = deque(baselines)
    returned: list[object] = []

    def baselines_in_turn() -> None:
        returned.clear()
        for name in order:
            for _ in range(warm):
                baselines[name]()
            seconds[name].append(_seconds(baselines[name], case.device))
        order.rotate()
        for _ in range(warm):
            ours()
        _synchronize(case.device)

    def ours_to_the_end() -> None:
        returned.append(ours())
        _synchronize(case.device)

    benchmark.pedantic(ours_to_the_end, setup=baselines_in_turn, rounds=rounds)
    benchmark.group = f"{case.op} {case.shape}"
    benchmark.extra_info.update(
        case={**dataclasses.asdict(case), "dtype": _name(case.dtype), "backend": case.backend},
        baselines=seconds,
        floor_seconds=floor.seconds(case) if floor else None,
        peaks=dict(peaks or {}),
        sizes=dict(sizes or {}),
    )


@functools.cache
def copy_rate(device: str) -> float:
    """Return bytes per second, reads and writes, of copying 256 MiB, the best of nine."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    best = min(_seconds(lambda: target.copy_(source), device) for _ in range(9))
    return 2 * source.nbytes / best


@functools.cache
def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Return operations per second of a square matrix product, the best of nine by each library there is."""
    size = 8192 if device == "cuda" else 2048
    left = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(left)
    ways: list[Call] = [lambda: torch.mm(left, left, out=out), lambda: products.linear(left, left)]
    best = min(_seconds(way, device) for way in ways for _ in range(9))
    return 2 * size**3 / best


def lines_touched(indices: list[torch.Tensor], itemsize: int, device: str) -> int:
    """Return the bytes of the memory lines that hold the selected entries: what a gather must read."""
    line = LINE_BYTES[device]
    return line * sum((index.long() * itemsize // line).unique().numel() for index in indices)


def peak_bytes(workload: str, device: str, *details: object) -> int | None:
    """Return the peak memory of a workload of memory.py above what it started with: the median of five processes.

    By where gaps in the heap fall, it differs by up to a tenth from one to another.
    """
    if device == "cpu" and sys.platform != "linux":
        return None  # only Linux can reset a process's peak
    script = Path(__file__).with_name("memory.py")
    command = [sys.executable, str(script), workload, device, *map(str, details)]
    return statistics.median(_output(command) for _ in range(5))


def machine() -> dict[str, Any]:
    """Return what rows are stamped with: devices, versions, commit, date."""
    stamp = provenance.stamp()
    versions = {name: stamp[name] for name in ("python", *provenance.PACKAGES)}
    return {
        "threads": torch.get_num_threads(),
        "cpu": f"{provenance.processor()}, {torch.get_num_threads()} threads",
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {**versions, "triton": metadata.version("triton") if find_spec("triton") else None},
        "commit": stamp["commit"],
        "date": stamp["date"],
    }


def _output(command: list[str]) -> int:
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{run.stderr}")
    return int(run.stdout)


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def _seconds(call: Call, device: str) -> float:
    _synchronize(device)
    start = time.perf_counter()
    returned = call()
    _synchronize(device)
    seconds = time.perf_counter() - start
    del returned
    return seconds


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
