"""Dynamic parameter selection with stage one's layers mixed with the pretrained ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparseft.mask import Mask
from sparseft.optim.base import SparseOptimizer
from sparseft.schedules.dps import DPS
from sparseft.schedules.masks import linear_weights
from sparseft.schedules.mixing import Mixing
from sparseft.schedules.states import check_parts, shapes


class DPSMix(DPS):
    """DPS Mix: in stage one, linear layers take random columns of their weights from the pretrained ones.

    A weight's score is its sum of squared gradients over the number of steps in which its column was its own, times
    exp(-that number / steps of the stage): what trained often is passed over. In stage two nothing is mixed: the same
    weights serve training and evaluation.

    It is for weights of linear layers alone. Beyond what `DPS` keeps there are their pretrained values.

    Args:
        model: as for `DPS`; it must be the pretrained one.
        optimizer: as for `DPS`.
        density: as for `DPS`.
        mix: probability that a column is the pretrained one, in [0, 1); by default 1 - density, as in the paper.
        frequency_penalty: whether the exponential above counts; the published code has it for stages of 50 steps and
            more.
        seed: of the draws.
        options: those of `DPS`.

    Raises:
        TypeError: as `DPS`, or seed is not a whole number.
        ValueError: as `DPS`, or mix is out of range, or include takes in what is no weight of a linear layer.

    Source: arXiv 2211.01642. The published code rescales in stage two as well, although nothing is drawn there, so
    that training sees other weights than evaluation, and its gradients lack the 1 / (1 - mix) of the forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: SparseOptimizer,
        density: float = 0.7,
        *,
        mix: float | None = None,
        frequency_penalty: bool = True,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(model, optimizer, density, **options)
        self.frequency_penalty = frequency_penalty
        try:
            self._mixing = Mixing(model, self._inputs(), 1 - density if mix is None else mix, seed, self._mixed_step)
        except (TypeError, ValueError):
            self._stop()
            raise
        self._frequency = self._no_frequency()

    def state_dict(self) -> dict[str, Any]:
        """Return what the schedule knows; the pretrained weights are part of it."""
        return {**super().state_dict(), "frequency": self._frequency, "pretrained": self._mixing.pretrained}

    def _check_state(self, state: dict[str, Any], mask: Mask) -> None:
        super()._check_state(state, mask)
        check_parts("frequency", state["frequency"], shapes(self._frequency))
        check_parts("pretrained", state["pretrained"], shapes(self._mixing.pretrained))

    def _load(self, state: dict[str, Any]) -> None:
        super()._load(state)
        for own, saved in ((self._frequency, "frequency"), (self._mixing.pretrained, "pretrained")):
            for name, values in own.items():
                values.copy_(state[saved][name])

    def _stop(self) -> None:
        super()._stop()
        if hasattr(self, "_mixing"):
            self._mixing.close()

    def _options(self) -> dict[str, Any]:
        mixing = {"mix": self._mixing.p, "seed": self._mixing.seed, "frequency_penalty": self.frequency_penalty}
        return {**super()._options(), **mixing}

    def _inputs(self) -> dict[str, int]:
        linear = linear_weights(self.model)
        other = [name for name in self._whole if name not in linear]
        if other:
            raise ValueError(
                f"columns are mixed of weights of linear layers, got {other[0]}; leave it out of include, or use DPS"
            )
        return {name: linear[name] for name in self._whole}

    def _mixed_step(self) -> int | None:
        return self.steps if self.stage == 1 else None

    def _no_frequency(self) -> dict[str, Tensor]:
        """Return one number a column: in how many steps of this stage it was the weight's own."""
        return {name: self._mixing.kept(name, 0).float().zero_() for name in self._whole}

    def _add_squares(self) -> None:
        super()._add_squares()
        for name, frequency in self._frequency.items():
            frequency += self._mixing.kept(name, self.steps - 1)

    @torch.no_grad()
    def _choose(self) -> Mask:
        # scores are no longer needed as they are
        for name, frequency in self._frequency.items():
            penalty = torch.exp(-frequency / self.stage_steps[0]) if self.frequency_penalty else 1.0
            self._scores[name].mul_(penalty / frequency.clamp(min=1))
        return super()._choose()

    def _freeze(self, mask: Mask) -> None:
        super()._freeze(mask)
        self._frequency = self._no_frequency()
