"""AdamW on selected entries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sparseft.optim.base import SparseOptimizer, Step
from sparseft.optim.options import SharedOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SparseAdamW(SparseOptimizer):
    """AdamW that trains selected entries only; with every entry selected, it is torch.optim.AdamW.

    Args:
        params: tensors, (name, tensor) pairs, or groups; `mask.param_groups(model)` as a rule. A group without
            `indices` trains whole.
        lr: weight change per step, a float or a 0-d tensor. Sparse training wants 10 to 50 times the rate of full
            fine-tuning.
        betas: decay of the running means of the gradient and its square, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled decay of the selected entries, per step times lr.
        options: those of every optimizer, `SharedOptions`.

    Raises:
        ValueError: an option is out of range, or index lists do not fit.

    Source: arXiv 1711.05101.
    """

    states = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Unpack[SharedOptions],
    ):
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), got {betas}")
        if not eps >= 0:
            raise ValueError(f"eps must be at least 0, got {eps}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, options)

    def _update(self, group: dict[str, Any], step: Step) -> None:
        beta1, beta2 = group["betas"]
        torch.ops.sparseft.adamw_(
            step.params,
            step.grads,
            step.indices,
            step.state("exp_avg"),
            step.state("exp_avg_sq"),
            step.masters,
            step.state("step"),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            **step.options,
        )
