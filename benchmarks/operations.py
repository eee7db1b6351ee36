"""Where the time of one workload of memory.py goes, by operation.

    python benchmarks/operations.py cpu2 estimate_fisher cpu MiniLM 4 16 128   # adds to results/operations-cpu2.csv

Shares are of the wall time, those of a GPU's kernels too. What is in no operation is Python, or a wait.
"""

from __future__ import annotations

import sys
import time

import memory
import provenance
import torch
from torch.profiler import ProfilerActivity, profile

_LEAST = 0.005  # of the wall time, for a line of its own


def shares(workload: str, device: str, *details: str) -> dict[str, float]:
    """Return operation -> share of the wall time that it takes by itself, largest first, and the rest."""
    _, run = memory.prepare(workload, device, *details)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    run()  # what compiles does so here, and memory is there
    on_gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        started = time.perf_counter()
        run()
        synchronize()
        wall = 1e6 * (time.perf_counter() - started)
    found = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / wall
        for event in profiled.key_averages()
    }
    large = {key: share for key, share in sorted(found.items(), key=lambda item: -item[1]) if share >= _LEAST}
    others = sum(found.values()) - sum(large.values())
    return {**large, "smaller operations": others, "no operation": 1 - sum(found.values())}


def main() -> None:
    machine, *workload = sys.argv[1:]
    found = shares(*workload)
    for name, share in found.items():
        print(f"{share:6.1%}  {name}")
    about = {"workload": " ".join(workload), **provenance.stamp()}
    rows = [{"operation": name, "share": round(share, 4), **about} for name, share in found.items()]
    provenance.append(provenance.RESULTS / f"operations-{machine}.csv", rows)


if __name__ == "__main__":
    main()
