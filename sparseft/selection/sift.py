"""SIFT: the largest gradients of the first batches. Source: arXiv 2312.11875."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn


def score(
    model: nn.Module,
    data: Iterable[Any] | None,
    names: list[str],
    *,
    seed: int,
    progress: bool,
    batches: int = 1,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return |d loss / d w| of the mean loss over the first batches, fp32.

    The published code takes the first micro-batch in training mode, and throws its gradient away; here the model is in
    evaluation mode, so that dropout does not choose, and `batches` says how many batches are averaged.

    Raises:
        ValueError: the data is empty, or a gradient is not finite.
    """
