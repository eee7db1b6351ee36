"""Print the peak memory of one workload above what was there before it, in bytes: `python memory.py WORKLOAD DEVICE`.

A process of its own for each: the allocator keeps what earlier work freed, which would hide what the next takes.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import torch
import workloads

from sparseft.integrations.measure import peak_memory, reset_peak_memory

Pass = Callable[[Any, dict[str, torch.Tensor]], Any]
PASSES: dict[str, Pass] = {
    "forward_backward": workloads.forward_backward,
    "published_loop": workloads.published_loop,
    "tuned_loop": workloads.tuned_loop,
    "sparseft_pass": workloads.sparseft_pass,
}
SELECTIONS: dict[str, Callable[[list[torch.Tensor], int], Any]] = {
    "topk_of_cat": workloads.topk_of_cat,
    "topk_indices": torch.ops.sparseft.topk_indices,
}


def prepare(workload: str, device: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return a small run, which loads what is loaded once, and the run to measure; its inputs are in memory."""
    if workload in PASSES:
        model, run = workloads.encoder(device), PASSES[workload]
        small, full = workloads.batch(device, 2, 8), workloads.batch(device)
        return lambda: (run(model, small), model.zero_grad()), lambda: run(model, full)
    run = SELECTIONS[workload]
    small, full = workloads.scores(device, 2, 100), workloads.scores(device)
    return lambda: run(small, 10), lambda: run(full, workloads.K)


def settle(device: str) -> int:
    """Give freed memory back to the system and forget the peak; return what is in use."""
    if device == "cuda":
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    reset_peak_memory()
    return peak_memory()


if __name__ == "__main__":
    warm_up, measured = prepare(sys.argv[1], sys.argv[2])
    warm_up()
    before = settle(sys.argv[2])
    measured()
    print(max(0, peak_memory() - before))
