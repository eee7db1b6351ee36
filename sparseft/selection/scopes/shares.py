"""Dividing a budget: in proportion to sizes, by largest remainders, in whole numbers throughout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def shares(total: int, sizes: Sequence[int]) -> list[int]:
    """Return how many of `total` entries, at most sum(sizes), each group gets; ties go to the first group."""
    whole = sum(sizes)
    counts = [total * size // whole for size in sizes]
    first = sorted(range(len(sizes)), key=lambda group: (-(total * sizes[group] % whole), group))
    for group in first[: total - sum(counts)]:
        counts[group] += 1
    return counts


def rounded_down(total: int, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Return each group's share rounded down, and its remainder in units of 1 / sum(sizes): int64, as sizes are."""
    products = total * sizes
    whole = int(sizes.sum())
    return torch.div(products, whole, rounding_mode="floor"), products % whole


def rounded_up(remainders: Tensor, candidates: Tensor, count: int) -> Tensor:
    """Return which `count` groups get one more: bool, by largest remainder, then largest candidate, then the first."""
    order = candidates.sort(descending=True, stable=True).indices
    order = order[remainders[order].sort(descending=True, stable=True).indices]
    chosen = torch.zeros_like(remainders, dtype=torch.bool)
    chosen[order[:count]] = True
    return chosen
