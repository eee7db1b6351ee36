"""The fallback: autograd, one sample at a time, for the parameters that no rule captures. Exact, and slow."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparseft.fisher.batches import Batch, take
from sparseft.fisher.loss import Objective


def add_one_by_one_(
    fisher: Mapping[str, Tensor],
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    positions: list[int],
    parameters: Mapping[str, Tensor],
) -> None:
    """Add each sample's squared gradient of the given parameters to fisher."""
    for index, position in enumerate(positions):
        pullback = objective(model, take(batch, [index]), [position])
        if not pullback.outputs.requires_grad:
            continue
        for cotangent in pullback.cotangents:
            grads = torch.autograd.grad(
                pullback.outputs, list(parameters.values()), cotangent, retain_graph=True, allow_unused=True
            )
            for name, grad in zip(parameters, grads, strict=True):
                if grad is not None:
                    grad = grad.to_dense().float()
                    fisher[name].addcmul_(grad, grad)
