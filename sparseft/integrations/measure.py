"""How much memory training takes."""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def reset_peak_memory() -> None:
    """Forget the peak so far, where the system can: on CUDA and on Linux."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        # "5" resets the peak resident set size, see proc(5)
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Return the peak since the last reset in bytes: allocated on the CUDA device, or resident in the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
