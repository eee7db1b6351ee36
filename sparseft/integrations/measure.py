"""What a training run costs: seconds per step and peak memory."""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback


class Clock(TrainerCallback):  # type: ignore[misc]
    """Times each optimizer step of a Trainer, forward and backward included, and shows a progress bar on stderr."""

    def __init__(self, description: str, progress: bool):
        self.seconds: list[float] = []
        self._started = 0.0
        self._bar: tqdm[Any] = tqdm(desc=description, unit="step", disable=not progress)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Learn how long the bar is."""
        self._bar.reset(total=state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._started = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self.seconds.append(_now() - self._started)
        self._bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the bar as it stands."""
        self._bar.close()

    @property
    def median(self) -> float:
        """Median seconds per step."""
        return statistics.median(self.seconds)


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


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
