"""From scores to a mask: exactly k entries, the same ones on every machine."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sparseft.mask import Mask
from sparseft.selection.arguments import check_count
from sparseft.selection.scopes import Layout, Scope, Structure, check_groups, largest, largest_units


def top_k(
    scores: Mapping[str, Tensor],
    density: float | None = None,
    *,
    k: int | None = None,
    per_group: int | None = None,
    scope: Scope = "global",
    structure: Structure | None = None,
    block: int | tuple[int, int] | None = None,
    layouts: Mapping[str, Layout] | None = None,
    unscored: Mapping[str, Sequence[int]] | None = None,
    **mask_options: Any,
) -> Mask:
    """Select the entries with the largest scores, exactly floor(density * n) of them (at least one).

    Ties go to the lowest (parameter, index). Scores are never concatenated.

    Args:
        scores: parameter name -> fp32, bf16 or fp16 score of every entry, the parameter's shape.
        density: selected over all entries, in (0, 1]. Give this, k or per_group.
        k: number of entries to select.
        per_group: number of entries to select in each group of the scope, or all of a smaller group.
        scope: among which entries the scores are ranked: "global", all together; "layer", those of each numbered layer
            (names like "layer.3."; names without a number are one group); "tensor", each parameter's; "row",
            "column" or "block", those of each row, column or block of each parameter. Groups share the budget in
            proportion to their size, so that each has its density times its size rounded down or up, and all
            together have exactly k; see `sparseft.selection.scopes.largest` for who is rounded up.
        structure: select whole units, each "row", "column" or "block", by their mean score, in place of entries. With
            a density, the best units that fit into the budget, and in the mask's info how many entries of it are
            "unused"; with k, exactly k entries or an error.
        block: rows and columns of a block; one number for both.
        layouts: parameter name -> which of its dimensions are rows and columns, as `sparseft.selection.layouts(model)`
            says; the first and the second where it is missing.
        unscored: parameter name -> shape, of parameters that count in the density, but cannot be selected.
        mask_options: passed on to Mask.

    Raises:
        TypeError: density is not a number; k, per_group or block is not made of whole numbers.
        ValueError: density, k, per_group or block out of range, or not for this scope; no scores, scores that are not
            finite or all zero; a structure whose units do not fit.
    """
    sides = check_groups(scope, structure, block, per_group, density is not None or k is not None)
    if per_group is None:
        check_density(density, k)
    total = sum(score.numel() for score in scores.values())
    if not total:
        raise ValueError("there is nothing to select from: no parameter is selectable; check include and exclude")
    shapes = {**{name: score.shape for name, score in scores.items()}, **(unscored or {})}
    count = k
    if density is not None:
        count = count_at(density, sum(math.prod(shape) for shape in shapes.values()))
    if count is not None and count > total:
        raise ValueError(f"k must be at most the {total:,} selectable entries, got {count:,}")
    scores = {name: score for name, score in scores.items() if score.numel()}
    highest = _highest(scores)
    views = layouts or {}
    if structure is not None and count is not None:
        indices = largest_units(scores, count, k is not None, scope, structure, sides, views)
    else:
        indices = largest(scores, count, per_group, scope, sides, views)
    _check_reach(scores, indices, highest, units=structure is not None)
    if structure is not None and count is not None and density is not None:
        unused = count - sum(index.numel() for index in indices.values())
        mask_options["info"] = {**(mask_options.get("info") or {}), "unused": unused}
    return Mask(indices, shapes, **mask_options)


def check_density(density: float | None, k: int | None = None) -> None:
    """Raise unless exactly one of density and k is given and in range."""
    if (density is None) == (k is None):
        raise ValueError(f"give either density or k, got density={density} and k={k}")
    if density is not None and (isinstance(density, bool) or not isinstance(density, (int, float))):
        raise TypeError(f"density must be a number in (0, 1], got {density!r}; 0.005 selects half a percent")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], got {density}; 0.005 selects half a percent")
    if k is not None:
        check_count("k", k)


def count_at(density: float, n: int) -> int:
    """Return how many of n entries a density selects: rounded down, at least one."""
    # a product like 0.29 * 100 falls just below its integer in binary; a part in 10^12 is no entry
    return max(1, math.floor(density * n * (1 + 1e-12)))


def _highest(scores: Mapping[str, Tensor]) -> float:
    """Return the largest score of all, or raise unless they are finite."""
    ends = {name: score.aminmax() for name, score in scores.items()}
    bad = [name for name, (low, high) in ends.items() if not math.isfinite(low) or not math.isfinite(high)]
    if bad:
        raise ValueError(
            f"scores must be finite, got NaN or infinite values in {', '.join(bad[:4])}; drop the samples that caused "
            "them"
        )
    return max(float(high) for _, high in ends.values())


def _check_reach(scores: Mapping[str, Tensor], indices: Mapping[str, Tensor], highest: float, *, units: bool) -> None:
    """Raise if no score tells anything, and warn if some selected entries have none. units: these may hold zeros."""
    lowest = [(float(scores[name].reshape(-1)[i.long()].min()), name) for name, i in indices.items() if i.numel()]
    if highest == 0 and min(lowest)[0] == 0:
        raise ValueError(
            "every score is zero: no entry is better than another; check that the loss depends on the model"
        )
    if min(lowest)[0] == 0 and not units:
        warnings.warn(
            f"some selected entries score zero (in {min(lowest)[1]}): the density reaches beyond what the scores tell "
            "apart; ties were broken by position. Use a lower density or more samples, or exclude what scores zero.",
            stacklevel=3,
        )
