"""Entries at random: the baseline every other method has to beat. Needs no data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def score(
    model: nn.Module, data: Iterable[Any] | None, names: list[str], *, seed: int, progress: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return fp32 scores drawn uniformly from [0, 1): on the CPU, so that a seed means the same on every device."""
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(parameters[name].shape, generator=generator) for name in names}, {}
