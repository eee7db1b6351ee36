"""Mixout: layers compute with weights some of whose entries are the pretrained ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from sparseft.mask import Mask, check_mask, match_names
from sparseft.optim.base import SparseOptimizer
from sparseft.schedules.base import Schedule
from sparseft.schedules.masks import linear_weights, whole_mask
from sparseft.schedules.mixing import Mixing
from sparseft.schedules.states import check_parts, shapes


class Mixout(Schedule):
    """A regulariser that pulls to the pretrained weights: in training, random entries of linear layers are those.

    A layer takes W0 + (W - W0) / (1 - p) for an entry with probability 1 - p, and W0 otherwise: W in the mean, another
    draw each step. The mask stays what it is. Only linear layers are mixed; a new head is better left out of them.

    Args:
        model: the pretrained model.
        optimizer: of this package.
        p: probability that an entry is the pretrained one, in [0, 1).
        mask: what the optimizer trains; None where it trains whole parameters.
        exclude: patterns of weights that are not mixed.
        seed: of the draws.

    Raises:
        TypeError: seed is not a whole number.
        ValueError: p is out of range, nothing is left to mix, or the optimizer trains other entries than the mask's.

    Source: arXiv 1909.11299. The published code replaces the model's layers by its own, draws for every forward pass,
    and its gradients lack the 1 / (1 - p).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: SparseOptimizer,
        p: float,
        mask: Mask | None = None,
        *,
        exclude: str | Iterable[str] = (),
        seed: int = 0,
    ) -> None:
        mask = whole_mask(model, optimizer, None, ()) if mask is None else mask
        check_mask(mask)
        inputs = [name for name in linear_weights(model) if name in mask or name in mask.dense]
        left_out = match_names(exclude, inputs, "exclude")
        inputs = [name for name in inputs if name not in left_out]
        if not inputs:
            raise ValueError("there is nothing to mix: the optimizer trains no weight of a linear layer, but excluded")
        super().__init__(model, optimizer, mask)
        try:
            self._mixing = Mixing(model, dict.fromkeys(inputs), p, seed, lambda: self.steps)
        except (TypeError, ValueError):
            self._stop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return what the schedule knows; the pretrained weights are part of it."""
        return {**super().state_dict(), "pretrained": self._mixing.pretrained}

    def _check_state(self, state: dict[str, Any], mask: Mask) -> None:
        check_parts("pretrained", state["pretrained"], shapes(self._mixing.pretrained))

    def _load(self, state: dict[str, Any]) -> None:
        for name, values in self._mixing.pretrained.items():
            values.copy_(state["pretrained"][name])

    def _stop(self) -> None:
        super()._stop()
        if hasattr(self, "_mixing"):
            self._mixing.close()

    def _options(self) -> dict[str, Any]:
        return {"p": self._mixing.p, "seed": self._mixing.seed, "mixed": list(self._mixing.pretrained)}

    def _after_step(self) -> None:
        """Nothing changes but the draw, which follows from the step."""
