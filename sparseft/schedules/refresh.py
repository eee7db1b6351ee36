"""Choosing anew every n steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sparseft.mask import Mask
from sparseft.optim.base import SparseOptimizer
from sparseft.schedules.base import Schedule


class Refresh(Schedule):
    """Chooses another mask after every n optimizer steps; entries that stay keep their optimizer state.

    Args:
        model: the model that trains.
        optimizer: of this package, made from `mask`.
        mask: what it begins with.
        every: optimizer steps between two choices.
        choose: takes the model as it is then, and returns the next mask, of the same parameters:
            `lambda model: sparseft.select("fish", model, loader, density=0.005)`. It is called with gradients enabled.

    Raises:
        ValueError: every is below 1, or the optimizer trains other entries than the mask's.

    Source: FISH's masks of every epoch, arXiv 2111.09839; there, momentum goes on moving what is no longer selected.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: SparseOptimizer,
        mask: Mask,
        *,
        every: int,
        choose: Callable[[nn.Module], Mask],
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1 optimizer step, got {every}")
        self.every, self._choose = every, choose
        super().__init__(model, optimizer, mask)

    def _options(self) -> dict[str, Any]:
        return {"every": self.every}

    def _after_step(self) -> None:
        if self.steps % self.every == 0:
            with torch.enable_grad():
                mask = self._choose(self.model)
            if (mask.shapes, mask.dense) != (self.mask.shapes, self.mask.dense):
                raise ValueError(
                    f"choose must return a mask of the same parameters as before, got one that selects from "
                    f"{len(mask.shapes)} in place of {len(self.mask.shapes)} and trains {len(mask.dense)} in place of "
                    f"{len(self.mask.dense)} whole, or others; select with the same include, exclude and dense, and "
                    "freeze nothing in between"
                )
            self._set_mask(mask)
