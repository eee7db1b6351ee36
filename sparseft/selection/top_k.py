"""From scores to a mask: exactly k entries, the same ones on every machine."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from sparseft import ops  # noqa: F401  (registers torch.ops.sparseft)
from sparseft.mask import Mask

Scope = Literal["global", "tensor"]


def top_k(
    scores: Mapping[str, Tensor],
    density: float | None = None,
    *,
    k: int | None = None,
    scope: Scope = "global",
    **mask_options: Any,
) -> Mask:
    """Select the entries with the largest scores, exactly floor(density * n) of them (at least one).

    Ties go to the lowest (parameter, index). Scores are never concatenated.

    Args:
        scores: parameter name -> fp32, bf16 or fp16 score of every entry, the parameter's shape.
        density: selected over all entries, in (0, 1]. Give this or k.
        k: number of entries to select.
        scope: "global" ranks all entries together; "tensor" takes the density of each parameter by itself, at least
            one entry each.
        mask_options: passed on to Mask.

    Raises:
        ValueError: density or k out of range, no scores, scores that are not finite or all zero.
    """
    check_density(density, k)
    total = sum(score.numel() for score in scores.values())
    if not total:
        raise ValueError("there is nothing to select from: no parameter is selectable; check include and exclude")
    if scope not in ("global", "tensor"):
        raise ValueError(f"scope must be 'global' or 'tensor', got {scope!r}")
    if k is not None and k > total:
        raise ValueError(f"k must be at most the {total:,} selectable entries, got {k:,}")
    shapes = {name: score.shape for name, score in scores.items()}
    if scope == "tensor":
        share = density if density is not None else k / total  # type: ignore[operator]
        indices = {name: _largest([score], count_at(share, score.numel()))[0] for name, score in scores.items()}
    else:
        count = k if k is not None else count_at(density, total)  # type: ignore[arg-type]
        indices = dict(zip(scores, _largest(list(scores.values()), count), strict=True))
    _check_reach(scores, indices)
    return Mask(indices, shapes, **mask_options)


def check_density(density: float | None, k: int | None = None) -> None:
    """Raise unless exactly one of density and k is given and in range."""
    if (density is None) == (k is None):
        raise ValueError(f"give either density or k, got density={density} and k={k}")
    if density is not None and not isinstance(density, (int, float)):
        raise TypeError(f"density must be a number in (0, 1], got {density!r}; 0.005 selects half a percent")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], got {density}; 0.005 selects half a percent")
    if k is not None and k < 1:
        raise ValueError(f"k must be at least 1, got {k}")


def count_at(density: float, n: int) -> int:
    """Return how many of n entries a density selects: rounded down, at least one."""
    # a product like 0.29 * 100 falls just below its integer in binary; a part in 10^12 is no entry
    return max(1, math.floor(density * n * (1 + 1e-12)))


def _largest(scores: list[Tensor], k: int) -> list[Tensor]:
    """Return one index list a tensor: where the k largest of all scores are."""
    indices, counts = torch.ops.sparseft.topk_indices(scores, k)
    return list(indices.split(counts.tolist()))


def _check_reach(scores: Mapping[str, Tensor], indices: Mapping[str, Tensor]) -> None:
    lowest = [(float(scores[name].reshape(-1)[i.long()].min()), name) for name, i in indices.items() if i.numel()]
    highest = max(float(score.max()) for score in scores.values() if score.numel())
    if highest == 0 and min(lowest)[0] == 0:
        raise ValueError(
            "every score is zero: no entry is better than another; check that the loss depends on the model"
        )
    if min(lowest)[0] == 0:
        warnings.warn(
            f"some selected entries score zero (in {min(lowest)[1]}): the density reaches beyond what the scores tell "
            "apart; ties were broken by position. Use a lower density or more samples.",
            stacklevel=3,
        )
