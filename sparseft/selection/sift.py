"""SIFT: the largest gradients of the first batches. Source: arXiv 2312.11875."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.fisher.batches import size, to_device
from sparseft.fisher.loss import Objective
from sparseft.fisher.state import evaluation


def score(
    model: nn.Module,
    data: Iterable[Any],
    names: list[str],
    *,
    seed: int,
    progress: bool,
    batches: int = 1,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return |d loss / d w| of the loss averaged over the samples of the first batches, fp32, in loss / weight.

    Differences from the published code: the model is in evaluation mode, so that dropout does not choose; the gradient
    that is ranked is of `batches` whole batches, not of the first part of one; all tensors may be ranked together
    (scope="global" of select).

    Raises:
        ValueError: batches is below 1, the data is empty or has no labels.
    """
    if batches < 1:
        raise ValueError(f"batches must be at least 1, got {batches}")
    objective = Objective("empirical", loss, "mean", seed)
    every = dict(model.named_parameters())
    parameters = {name: every[name] for name in names}
    sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    device = next(model.parameters()).device
    samples = 0
    with evaluation(model, parameters):
        for batch in itertools.islice(data, batches):
            positions = list(range(samples, samples + size(batch)))
            samples += len(positions)
            losses = objective(model, to_device(batch, device), positions).outputs
            grads = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)
            for total, grad in zip(sums.values(), grads, strict=True):
                if grad is not None:
                    total += grad
    if not samples:
        raise ValueError("data must hold at least one batch, got none; check the data set and its filters")
    return {name: total.abs_().div_(samples) for name, total in sums.items()}, {"samples": samples}
