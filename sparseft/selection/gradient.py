"""Gradients of whole batches, for methods that rank these: in evaluation mode, with nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.fisher.batches import Batch, to_device
from sparseft.fisher.loss import Objective
from sparseft.fisher.state import evaluation
from sparseft.selection.arguments import check_count
from sparseft.selection.watched import first_batches


def for_each_gradient(
    model: nn.Module,
    batches: Iterable[tuple[Batch, list[int]]],
    names: Iterable[str],
    value: Callable[[Batch, list[int]], Tensor],
    take: Callable[[str, Tensor, int], None],
) -> int:
    """Differentiate a value of each batch, and return how many samples there were.

    The model runs in evaluation mode, so that dropout does not choose, and is left as it was found.

    Args:
        model: whose parameters are differentiated by.
        batches: with the positions of their samples, as `sparseft.selection.watched` yields them.
        names: of the parameters.
        value: runs the model on a batch and returns a scalar.
        take: is given a parameter's name, its gradient and the number of samples of the batch, once for each parameter
            that the value depends on.
    """
    every = dict(model.named_parameters())
    parameters = {name: every[name] for name in names}
    device = next(iter(every.values())).device
    samples = 0
    with evaluation(model, parameters):
        for batch, positions in batches:
            total = value(to_device(batch, device), positions)
            samples += len(positions)
            if not total.requires_grad:
                continue
            grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
            for name, grad in zip(parameters, grads, strict=True):
                if grad is not None:
                    take(name, grad.to_dense() if grad.is_sparse else grad, len(positions))
    return samples


def mean_gradient(
    model: nn.Module,
    data: Iterable[Any],
    names: Iterable[str],
    *,
    batches: int,
    loss: Callable[[nn.Module, Any], Tensor] | None,
    progress: bool,
) -> tuple[dict[str, Tensor], int]:
    """Return the gradient of the loss averaged over the samples of the first batches, fp32, and how many there were.

    Raises:
        TypeError: batches is not a whole number.
        ValueError: batches is below 1, the data is empty or has no labels.
    """
    check_count("batches", batches)
    objective = Objective("empirical", loss, "mean", seed=0)
    sums = zeros(model, names)

    def take(name: str, grad: Tensor, samples: int) -> None:
        sums[name].add_(grad)

    first = first_batches(data, batches, progress=progress)
    samples = for_each_gradient(
        model, first, names, lambda batch, positions: objective(model, batch, positions).outputs.sum(), take
    )
    return {name: total.div_(samples) for name, total in sums.items()}, samples


def zeros(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return fp32 zeros of the shapes of parameters, on their devices."""
    every = dict(model.named_parameters())
    return {name: torch.zeros_like(every[name], dtype=torch.float32) for name in names}
