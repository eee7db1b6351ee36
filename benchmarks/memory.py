"""Print the peak memory of one workload above what was there before it, in bytes.

    python benchmarks/memory.py estimate_fisher cpu MiniLM 1 16 128
    python benchmarks/memory.py topk_indices cpu 25 125000
    python benchmarks/memory.py topk_of_file cpu scores.safetensors 125000

A process of its own for each: the allocator keeps what earlier work freed, which would hide what the next takes.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import leftovers
import peers
import torch
import training_steps
import workloads
from torch import nn

from sparseft.integrations.measure import peak_memory, reset_peak_memory

SELECTIONS: dict[str, Callable[[list[torch.Tensor], int], Any]] = {
    "topk_of_cat": workloads.topk_of_cat,
    "topk_indices": torch.ops.sparseft.topk_indices,
}
OF_FILES: dict[str, Callable[[str, int], Any]] = {
    "topk_of_loaded": workloads.topk_of_loaded,
    "topk_of_file": workloads.topk_of_file,
}


def prepare(workload: str, device: str, *details: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return a small run, which loads what is loaded once, and the run to measure; its inputs are in memory."""
    if workload in SELECTIONS:
        select = SELECTIONS[workload]
        tensors, k = map(int, details)
        few, many = workloads.scores(device, 2, 100), workloads.scores(device, tensors)
        return lambda: select(few, 10), lambda: select(many, k)
    if workload in OF_FILES:
        return _of_files(OF_FILES[workload], details[0], int(details[1]))
    if workload in leftovers.WAYS:
        return _leftovers(leftovers.WAYS[workload], details[0], device)
    name, batches, samples, tokens, *density = details
    model = workloads.MODELS[name](device)
    if workload in training_steps.STEPS:
        return _steps(workload, model, device, name, int(samples), int(tokens), *map(float, density))
    if workload in peers.PEERS:
        run = peers.PEERS[workload](model)
    else:
        run = functools.partial(workloads.PASSES[workload], model)
    small = workloads.batches(name, device, 1, 2, 8)
    full = workloads.batches(name, device, int(batches), int(samples), int(tokens))
    return lambda: (run(small), model.zero_grad()), lambda: run(full)


def _of_files(select: Callable[[str, int], Any], path: str, k: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    def small() -> None:
        with tempfile.TemporaryDirectory() as folder:
            few = str(Path(folder, "few"))
            workloads.save_scores(few, 2, 100)
            select(few, 10)

    return small, lambda: select(path, k)


def _leftovers(way: Callable[..., Any], name: str, device: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    model, parameters, full = leftovers.prepared(name, device)
    run = way(model, parameters)
    return lambda: run(tuple(part[:2] for part in full)), lambda: run(full)


def _steps(
    workload: str, model: nn.Module, device: str, name: str, samples: int, tokens: int, density: float
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return the same for training steps: what is prepared for them counts too."""
    prepare_steps = training_steps.STEPS[workload]
    (small,), (full,) = (workloads.batches(name, device, 1, n, t) for n, t in ((2, 8), (samples, tokens)))

    def measured() -> None:
        step = prepare_steps(model.train(), density)
        step(full)
        step(full)

    return lambda: prepare_steps(copy.deepcopy(model).train(), density)(small), measured


def settle() -> int:
    """Give freed memory back to the system and forget the peak; return what is in use."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    reset_peak_memory()
    return peak_memory()


if __name__ == "__main__":
    warm_up, measured = prepare(*sys.argv[1:])
    warm_up()
    before = settle()
    measured()
    print(max(0, peak_memory() - before))
