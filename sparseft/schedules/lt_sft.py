"""Lottery-ticket sparse fine-tuning: train everything, keep what changed most, begin again with that alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.mask import Mask
from sparseft.optim.base import SparseOptimizer
from sparseft.schedules.base import Schedule
from sparseft.schedules.masks import ranked, whole_mask
from sparseft.selection.scopes import Scope, check_groups
from sparseft.selection.top_k import check_density


class LTSFT(Schedule):
    """LT-SFT: everything trains for some steps; then those entries are chosen that changed most, and all are rewound.

    From there on the chosen entries train alone, from the pretrained values and with an optimizer that knows nothing:
    its states are dropped. A learning rate scheduler is to be begun anew by who has one, after step `steps`.
    Parameters that may not be chosen (a new head) train whole in both phases, and are rewound too. Buffers are not.

    `mask` and `sparseft.save_delta` then give a delta of the pretrained model. Until the choice, the pretrained values
    of all that trains are kept.

    Args:
        model: the pretrained model.
        optimizer: of this package, made from whole parameters: `SparseAdamW(model.parameters(), ...)`.
        density: share of the entries that is chosen, in (0, 1].
        steps: optimizer steps in which everything trains.
        include: patterns of the parameters to choose from; by default all that the optimizer trains.
        dense: patterns of parameters that always train whole.
        scope: among which entries changes are ranked, as `top_k` has it; all together, as in the paper.

    Raises:
        ValueError: steps is below 1, the density is out of range, a pattern matches nothing, or the optimizer does not
            train whole parameters of the model.

    Source: arXiv 2110.07560. In the published code ties choose more than asked for, and weight decay moves what the
    second phase does not train. Its option of several rounds is not here.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: SparseOptimizer,
        density: float,
        steps: int,
        *,
        include: str | Iterable[str] | None = None,
        dense: str | Iterable[str] = (),
        scope: Scope = "global",
    ) -> None:
        check_density(density)
        check_groups(scope, None, None, None, counted=True)
        if steps < 1:
            raise ValueError(f"everything must train for at least one step before the choice, got {steps}")
        self.density, self.full_steps, self.scope = density, steps, scope
        super().__init__(model, optimizer, whole_mask(model, optimizer, include, dense))
        self._pretrained = {name: weight.clone() for name, weight in self._weights().items()}

    @property
    def chosen(self) -> bool:
        """Whether the entries that train were chosen already."""
        return self.steps >= self.full_steps

    def state_dict(self) -> dict[str, Any]:
        """Return what the schedule knows; until the choice, the pretrained weights are part of it."""
        return {**super().state_dict(), "pretrained": self._pretrained}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another schedule of the same options was; the optimizer's state is to be loaded after this.

        Raises:
            ValueError: the options are others, or the mask is of another model; nothing was changed.
        """
        super().load_state_dict(state)
        weights = self._weights()
        self._pretrained = {
            name: saved.to(weights[name].device, copy=True) for name, saved in state["pretrained"].items()
        }

    def _options(self) -> dict[str, Any]:
        return {"density": self.density, "steps": self.full_steps, "scope": self.scope}

    def _weights(self) -> dict[str, Tensor]:
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name].detach() for name in (*self.mask.shapes, *self.mask.dense)}

    @torch.no_grad()
    def _after_step(self) -> None:
        if self.steps != self.full_steps:
            return
        weights = self._weights()
        self._set_mask(self._choose())
        self.optimizer.state.clear()
        for name, pretrained in self._pretrained.items():
            weights[name].copy_(pretrained)
        self._pretrained = {}

    def _choose(self) -> Mask:
        whole, weights = self.mask, self._weights()
        changes = {name: (weights[name].float() - self._pretrained[name].float()).abs_() for name in whole.shapes}
        info = {"method": "LTSFT", "density_asked": self.density, "scope": self.scope, "step": self.steps}
        return ranked(changes, whole, self.model, self.density, self.scope, info)
