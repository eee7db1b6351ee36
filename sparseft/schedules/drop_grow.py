"""Drop and grow: entries that changed little make room for those with large gradients, every n steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sparseft import ops  # noqa: F401  (registers torch.ops.sparseft)
from sparseft.mask import Mask
from sparseft.optim.base import SparseOptimizer
from sparseft.optim.mask_change import Move
from sparseft.schedules.base import Schedule
from sparseft.schedules.states import check_parts, shapes
from sparseft.selection.arguments import check_number, check_whole


class DropGrow(Schedule):
    """Every n steps, each tensor exchanges a part of its entries; how many it has stays.

    Those whose weights are nearest to the pretrained ones are dropped, and get these back. As many others, with the
    largest gradients of the step, are grown: they begin where they are, with moments of zero. So what is not selected
    has its pretrained value at all times, and `sparseft.save_delta(model, schedule.mask, ...)` holds the difference.

    Dense gradients are looked at in the steps of an exchange alone. The pretrained values of the selected entries are
    kept, k numbers.

    Args:
        model: the pretrained model.
        optimizer: of this package, made from `mask`.
        mask: what it begins with.
        every: optimizer steps between two exchanges.
        fraction: how much of each tensor's entries is exchanged, in (0, 1], rounded down.
        until: the step of the last exchange; the fraction falls to 0 there as a cosine does. None: it never falls.

    Raises:
        TypeError: a number of steps is not whole.
        ValueError: an option is out of range, or the optimizer trains other entries than the mask's.

    Source: RigL, arXiv 1911.11134, whose weights are dropped by size, to zero, for training from scratch. There the
    step of an exchange leaves the weights as they are, and what was dropped may be grown again at once.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: SparseOptimizer,
        mask: Mask,
        *,
        every: int,
        fraction: float = 0.3,
        until: int | None = None,
    ) -> None:
        check_whole("every", every)
        if every < 1:
            raise ValueError(f"every must be at least 1 optimizer step, got {every}")
        check_number("fraction", fraction)
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction must lie in (0, 1], got {fraction}")
        if until is not None:
            check_whole("until", until)
        if until is not None and until < every:
            raise ValueError(f"until must be at least {every}, the step of the first exchange, got {until}")
        self.every, self.fraction, self.until = every, fraction, until
        super().__init__(model, optimizer, mask)
        self._pretrained = {name: self._flat(name)[mask[name].long()] for name in mask}

    def state_dict(self) -> dict[str, Any]:
        """Return what the schedule knows; the pretrained values of the selected entries are part of it."""
        return {**super().state_dict(), "pretrained": self._pretrained}

    def _check_state(self, state: dict[str, Any], mask: Mask) -> None:
        check_parts("pretrained", state["pretrained"], shapes(mask))

    def _load(self, state: dict[str, Any]) -> None:
        self._pretrained = {name: saved.to(self._flat(name), copy=True) for name, saved in state["pretrained"].items()}

    def _awaited(self) -> tuple[int, str] | None:
        return self.every, "every="

    def _options(self) -> dict[str, Any]:
        return {"every": self.every, "fraction": self.fraction, "until": self.until}

    def _flat(self, name: str) -> Tensor:
        return self.model.get_parameter(name).detach().view(-1)

    def _fraction_now(self) -> float:
        if self.until is None:
            return self.fraction
        return self.fraction / 2 * (1 + math.cos(math.pi * min(1.0, self.steps / self.until)))

    @torch.no_grad()
    def _after_step(self) -> None:
        if self.steps % self.every or (self.until is not None and self.steps > self.until):
            return
        before, fraction = self.mask, self._fraction_now()
        indices = {name: self._exchanged(name, fraction) for name in before}
        info = {**before.info, "exchanged_at": self.steps}
        mask = Mask(
            indices,
            before.shapes,
            dense=before.dense,
            aliases=before.aliases,
            info=info,
            fingerprint=before.fingerprint,
        )
        self._set_mask(mask)
        for name in before:
            self._put_back(name, before[name].to(indices[name].device), indices[name])

    def _exchanged(self, name: str, fraction: float) -> Tensor:
        """Return the entries of a tensor after an exchange."""
        weights, grad = self._flat(name), self.model.get_parameter(name).grad
        old = self.mask[name].to(weights.device)
        count = min(math.floor(fraction * old.numel()), weights.numel() - old.numel())
        if grad is None:
            return old
        change = (weights[old.long()].float() - self._pretrained[name].float()).abs_()
        kept, _ = torch.ops.sparseft.topk_indices([change], old.numel() - count)
        sizes = grad.detach().reshape(-1).float().abs()
        # what is not finite says nothing, and a step is judged by the selected gradients alone
        sizes[~sizes.isfinite()] = 0
        # neither what is selected nor what is dropped now
        sizes[old.long()] = -1
        grown, _ = torch.ops.sparseft.topk_indices([sizes], count)
        return torch.cat([old[kept.long()], grown.to(old.dtype)]).sort().values

    def _put_back(self, name: str, old: Tensor, new: Tensor) -> None:
        """Give dropped entries their pretrained values, and take those of grown ones."""
        weights, pretrained = self._flat(name), self._pretrained[name]
        dropped = ~Move.between(new, old).stays
        weights[old[dropped].long()] = pretrained[dropped]
        self._pretrained[name] = Move.between(old, new).carry(pretrained, weights[new.long()])
