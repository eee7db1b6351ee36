"""SIFT: the largest gradients of the first batches. Source: arXiv 2312.11875."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from sparseft.selection.gradient import mean_gradient


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
        TypeError: batches is not a whole number.
        ValueError: batches is below 1, the data is empty or has no labels.
    """
    grads, samples = mean_gradient(model, data, names, batches=batches, loss=loss, progress=progress)
    return {name: grad.abs_() for name, grad in grads.items()}, {"samples": samples}
