"""SGD with momentum on selected entries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sparseft.optim.base import SparseOptimizer


class SparseSGD(SparseOptimizer):
    """SGD that trains selected entries only; with every entry selected, it is torch.optim.SGD.

    Args:
        params: as for SparseAdamW.
        lr: step size, a float or a 0-d tensor.
        momentum: weight of the running gradient; 0 keeps no state but the step count.
        dampening: share of the gradient that is left out of the running one, from the second step on.
        weight_decay: L2 penalty, added to the gradient of the selected entries.
        nesterov: look ahead along the momentum; needs momentum and no dampening.
        maximize: ascend instead of descend.

    Raises:
        ValueError: an option is out of range, or index lists do not fit.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ):
        if not momentum >= 0:
            raise ValueError(f"momentum must be at least 0, got {momentum}")
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError(f"nesterov needs momentum > 0 and dampening 0, got {momentum} and {dampening}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        indices: list[Tensor],
        states: list[dict[str, Any]],
        masters: list[Tensor],
        steps: list[Tensor],
        shared: dict[str, Any],
    ) -> None:
        if group["momentum"]:
            buffers = [state["momentum_buffer"] for state in states]
        else:
            buffers = [master[:0] for master in masters]
        torch.ops.sparseft.sgd_(
            params, grads, indices, buffers, masters, steps,
            momentum=group["momentum"], dampening=group["dampening"], nesterov=group["nesterov"], **shared,
        )  # fmt: skip
