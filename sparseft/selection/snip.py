"""SNIP: the weights whose removal would change the loss most, to first order. Source: arXiv 1810.02340."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
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
    """Return |w * d loss / d w| of the loss averaged over the samples of the first batches, fp32, in units of loss.

    Differences from the published code: there the best weights of a network that was just initialised are kept and the
    rest becomes zero; here the network is pretrained, nothing is removed, and the best weights are those that train.
    Scores are not divided by their sum, which changes no rank. The published code looks at one batch of the training
    set, as `batches=1` does. A weight that is zero, as biases are at first, scores zero.

    Raises:
        TypeError: batches is not a whole number.
        ValueError: batches is below 1, the data is empty or has no labels.
    """
    grads, samples = mean_gradient(model, data, names, batches=batches, loss=loss, progress=progress)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        return {name: grad.mul_(parameters[name]).abs_() for name, grad in grads.items()}, {"samples": samples}
