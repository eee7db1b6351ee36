"""Seconds of workloads of memory.py over several processes, and how many pages of memory each took anew.

    python benchmarks/processes.py cpu2 alone estimate_fisher,published_loop cpu MiniLM 4 16 128
    python benchmarks/processes.py cpu2 together estimate_fisher,published_loop cpu MiniLM 4 16 128

Adds to results/processes-cpu2.csv. Alone, each workload has processes of its own, as its user has; together, those of
a process take turns, and what one took from the system and did not give back serves the others, too. How much that is
differs from process to process, and with it the times, by up to a half: so there are several. A figure is the median
over them, of each the median of some runs after one that is not timed.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import provenance

_TURNS = 7
_RUNS = 3
_GROUPS = {"alone": lambda names: [[name] for name in names], "together": lambda names: [names]}


def measure(names: list[str], device: str, *details: str) -> dict[str, tuple[float, float]]:
    """Return the medians of seconds and of page faults of a run of each workload, name -> (seconds, faults)."""
    import memory
    import torch

    prepared = {name: memory.prepare(name, device, *details) for name in names}
    for small, run in prepared.values():
        small()
        run()
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in names}
    for _ in range(_RUNS):
        for name, (_small, run) in prepared.items():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            started = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            found[name].append((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))
    return {
        name: (statistics.median(seconds for seconds, _ in runs), statistics.median(faults for _, faults in runs))
        for name, runs in found.items()
    }


def in_process(names: list[str], case: list[str]) -> dict[str, tuple[float, float]]:
    """Return what `measure` finds in a new process."""
    command = [sys.executable, str(Path(__file__)), "--one", ",".join(names), *case]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: dict[str, tuple[float, float]] = json.loads(output.splitlines()[-1])
    return found


def main() -> None:
    machine, how, workloads, *case = sys.argv[1:]
    names = workloads.split(",")
    turns: list[dict[str, tuple[float, float]]] = []
    for turn in range(_TURNS):
        print(f"\r{turn} of {_TURNS}", end="", file=sys.stderr)
        turns.append({name: found for group in _GROUPS[how](names) for name, found in in_process(group, case).items()})
    print("\r", end="", file=sys.stderr)
    rows = []
    for name in names:
        ratios = sorted(turn[name][0] / turn[names[0]][0] for turn in turns)
        rows.append(
            {
                "workload": " ".join([name, *case]),
                "processes": f"{_TURNS}, {how}",
                "seconds": f"{statistics.median(turn[name][0] for turn in turns):.4g}",
                "ratio": f"{statistics.median(ratios):.4g}",
                "lowest": f"{ratios[0]:.4g}",
                "highest": f"{ratios[-1]:.4g}",
                "page_faults": f"{statistics.median(turn[name][1] for turn in turns):.0f}",
                **provenance.stamp(),
            }
        )
    for row in rows:
        print(
            f"{row['seconds']:>8} s  {row['ratio']:>6} x ({row['lowest']} to {row['highest']})  "
            f"{row['page_faults']:>8} page faults  {row['workload']}"
        )
    provenance.append(provenance.RESULTS / f"processes-{machine}.csv", rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2].split(","), *sys.argv[3:])))
    else:
        main()
