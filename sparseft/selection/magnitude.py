"""The largest weights. Needs no data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def score(
    model: nn.Module, data: Iterable[Any] | None, names: list[str], *, seed: int, progress: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return |w| of every entry, in the weight's own unit and dtype."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        return {name: parameters[name].abs() for name in names}, {}
