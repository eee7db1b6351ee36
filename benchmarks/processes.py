"""Seconds of workloads of memory.py, each in a process of its own, and how many pages of memory it took anew.

    python benchmarks/alone.py cpu2 estimate_fisher,published_loop cpu MiniLM 4 16 128  # adds to alone-cpu2.csv

In one process, what one workload took from the system and did not give back serves the others, too. Here each has
what its user has. Processes take turns. A figure is the median of five runs, after one that is not timed, of the
median process.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import provenance

_PROCESSES = 3
_RUNS = 5


def measure(workload: str, device: str, *details: str) -> tuple[float, float]:
    """Return the medians of seconds and of page faults of a run."""
    import memory
    import torch

    small, run = memory.prepare(workload, device, *details)
    small()
    run()
    seconds, faults = [], []
    for _ in range(_RUNS):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return statistics.median(seconds), statistics.median(faults)


def main() -> None:
    machine, workloads, *case = sys.argv[1:]
    names = workloads.split(",")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(_PROCESSES):
        for name in names:
            command = [sys.executable, str(Path(__file__)), "--one", name, *case]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            seconds, faults = map(float, output.split())
            found[name].append((seconds, faults))
    medians = {name: sorted(times)[_PROCESSES // 2] for name, times in found.items()}
    first = medians[names[0]][0]
    rows = [
        {
            "workload": " ".join([name, *case]),
            "seconds": f"{seconds:.4g}",
            "ratio": f"{seconds / first:.4g}",
            "page_faults": f"{faults:.0f}",
            **provenance.stamp(),
        }
        for name, (seconds, faults) in medians.items()
    ]
    for row in rows:
        print(f"{row['seconds']:>8} s  {row['ratio']:>6} x  {row['page_faults']:>8} page faults  {row['workload']}")
    provenance.append(provenance.RESULTS / f"alone-{machine}.csv", rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(*measure(*sys.argv[2:]))
    else:
        main()
