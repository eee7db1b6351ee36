"""The fallback: autograd, one sample at a time, for the parameters that no rule captures. Exact, and slow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from sparseft.fisher.batches import Batch, take
from sparseft.fisher.loss import Objective


def one_by_one(
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    positions: list[int],
    parameters: Mapping[str, Tensor],
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield (position, fp32 gradients by name) of each sample and cotangent; parameters without one are left out."""
    for index, position in enumerate(positions):
        pullback = objective(model, take(batch, [index]), [position])
        if not pullback.outputs.requires_grad:
            continue
        for cotangent in pullback.cotangents:
            grads = torch.autograd.grad(
                pullback.outputs, list(parameters.values()), cotangent, retain_graph=True, allow_unused=True
            )
            named = zip(parameters, grads, strict=True)
            yield position, {name: grad.to_dense().float() for name, grad in named if grad is not None}
