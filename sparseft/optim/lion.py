"""Lion on selected entries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sparseft.optim.base import SparseOptimizer, Step
from sparseft.optim.options import SharedOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SparseLion(SparseOptimizer):
    """Lion that trains selected entries only: each moves by lr, against the sign of a mean of its gradients.

    Args:
        params: as for SparseAdamW.
        lr: weight change per step, a float or a 0-d tensor. Lion wants a third to a tenth of AdamW's.
        betas: share of the running mean in the direction of a step, and decay of that mean, each in [0, 1).
        weight_decay: decoupled decay of the selected entries, per step times lr; three to ten times
            AdamW's.
        options: those of every optimizer, `SharedOptions`.

    Raises:
        ValueError: an option is out of range, or index lists do not fit.

    Source: arXiv 2302.06675.
    """

    states = ("exp_avg",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Unpack[SharedOptions],
    ):
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), got {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, options)

    def _update(self, group: dict[str, Any], step: Step) -> None:
        beta1, beta2 = group["betas"]
        torch.ops.sparseft.lion_(
            step.params,
            step.grads,
            step.indices,
            step.state("exp_avg"),
            step.masters,
            step.state("step"),
            beta1=beta1,
            beta2=beta2,
            **step.options,
        )
