"""A Trainer that stops when training has diverged. Imports transformers: imported only when training starts."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Trainer

LOOK_EVERY = 25  # steps


class WatchedTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that ends with an error when the loss has not been finite for 25 steps, at the next look.

    One step may well have such a loss: a schedule leaves it out, and the run goes on.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._peaks = [group.get("initial_lr", group["lr"]) for group in self.optimizer.param_groups]
        self._bad_steps: Tensor | None = None
        self._taken = 0

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take a step, and return its loss.

        Raises:
            RuntimeError: training diverged.
        """
        loss: Tensor = super().training_step(*args, **kwargs)
        bad = (~loss.detach().isfinite()).int()
        # counted where the loss is: to look at it would be a wait for the device
        self._bad_steps = bad if self._bad_steps is None else (self._bad_steps + 1) * bad
        self._taken += 1
        if self._taken % LOOK_EVERY == 0 and int(self._bad_steps) >= LOOK_EVERY:
            rates = " and ".join(f"{rate:g}" for rate in dict.fromkeys(self._peaks))
            raise RuntimeError(
                f"training diverged at learning rate {rates}: the loss is not finite, from step "
                f"{self._taken + 1 - int(self._bad_steps)} to step {self._taken}, where it ended; choose a lower one"
            )
        return loss
