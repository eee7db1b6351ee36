"""SGD with momentum on selected entries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sparseft.optim.base import SparseOptimizer, Step
from sparseft.optim.options import SharedOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SparseSGD(SparseOptimizer):
    """SGD that trains selected entries only; with every entry selected, it is torch.optim.SGD.

    Args:
        params: as for SparseAdamW.
        lr: step size, a float or a 0-d tensor.
        momentum: weight of the running gradient; 0 keeps no state but the step count.
        dampening: share of the gradient that is left out of the running one, from the second step on.
        weight_decay: L2 penalty, added to the gradient of the selected entries.
        nesterov: look ahead along the momentum; needs momentum and no dampening.
        options: those of every optimizer, `SharedOptions`.

    Raises:
        ValueError: an option is out of range, or index lists do not fit.
    """

    states = ("momentum_buffer",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **options: Unpack[SharedOptions],
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
        }
        super().__init__(params, defaults, options)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.states if group["momentum"] else ()

    def _update(self, group: dict[str, Any], step: Step) -> None:
        momentum = group["momentum"]
        torch.ops.sparseft.sgd_(
            step.params,
            step.grads,
            step.indices,
            step.state("momentum_buffer") if momentum else [master[:0] for master in step.masters],
            step.masters,
            step.state("step"),
            momentum=momentum,
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            **step.options,
        )
