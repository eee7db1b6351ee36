"""How long training steps take. Imports transformers, so it is imported only when training starts."""

from __future__ import annotations

import statistics
import time
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


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
