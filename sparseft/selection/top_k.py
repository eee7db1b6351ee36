"""From scores to a mask: exactly k entries, the same ones on every machine."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from sparseft.mask import Mask
from sparseft.selection.arguments import check_count, check_finite
from sparseft.selection.scopes import (
    Layout,
    Scope,
    Selected,
    Structure,
    budgets,
    check_groups,
    largest,
    largest_stored,
    largest_units,
)
from sparseft.selection.score_files import Paths, StoredScore, loaded, opened


def top_k(
    scores: Mapping[str, Tensor] | Paths,
    density: float | None = None,
    *,
    k: int | None = None,
    per_group: int | None = None,
    scope: Scope = "global",
    structure: Structure | None = None,
    block: int | tuple[int, int] | None = None,
    layouts: Mapping[str, Layout] | None = None,
    unscored: Mapping[str, Sequence[int]] | None = None,
    progress: bool = True,
    **mask_options: Any,
) -> Mask:
    """Select the entries with the largest scores, exactly floor(density * n) of them (at least one).

    Ties go to the lowest (parameter, index). Scores are never concatenated. Those in files are read three times, a few
    megabytes at a time; for rows, columns, blocks and whole units a parameter at a time.

    Args:
        scores: parameter name -> fp32, bf16 or fp16 score of every entry, the parameter's shape. Or a safetensors file
            of them, or a list of files that hold them together. Parameters of a file that `FisherScores.save` wrote
            are in the order of the model, those of another as they lie in the file.
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
        progress: show a bar, if files are read for longer than two seconds.
        mask_options: dense, aliases, info and fingerprint, as `Mask` takes them: dense is parameter name -> shape, and
            no pattern.

    Raises:
        FileNotFoundError: a file is not there.
        RuntimeError: a file was changed while it was read.
        TypeError: density is not a number; k, per_group or block is not made of whole numbers; scores are neither
            tensors nor files, or of another dtype.
        ValueError: density, k, per_group or block out of range, or not for this scope; no scores, scores that are not
            finite or all zero; a structure whose units do not fit; a file that holds no scores, or is cut short.
    """
    sides = check_groups(scope, structure, block, per_group, density is not None or k is not None)
    if per_group is None:
        check_density(density, k)
    with _held(scores, progress) as held:
        total = sum(score.numel() for score in held.values())
        if not total:
            raise ValueError("there is nothing to select from: no scores were given, or none but of empty parameters")
        shapes = {**{name: score.shape for name, score in held.items()}, **(unscored or {})}
        count = k
        if density is not None:
            count = count_at(density, sum(math.prod(shape) for shape in shapes.values()))
        if count is not None and count > total:
            raise ValueError(_too_many(density, count, total, unscored))
        filled = {name: score for name, score in held.items() if score.numel()}
        views = layouts or {}
        selected = _selected(filled, count, k is not None, per_group, scope, structure, sides, views)
    _check_reach(selected, units=structure is not None)
    if structure is not None and count is not None and density is not None:
        unused = count - sum(index.numel() for index in selected.indices.values())
        mask_options["info"] = {**(mask_options.get("info") or {}), "unused": unused}
    return Mask(selected.indices, shapes, **mask_options)


def check_density(density: float | None, k: int | None = None) -> None:
    """Raise unless exactly one of density and k is given and in range."""
    if (density is None) == (k is None):
        raise ValueError(f"give either density or k, got density={density} and k={k}")
    if k is not None:
        check_count("k", k)
    else:
        check_share(density)


def check_share(density: object) -> None:
    """Raise unless a density is a number in range."""
    if isinstance(density, bool) or not isinstance(density, (int, float)):
        raise TypeError(f"density must be a number in (0, 1], got {density!r}; 0.005 selects half a percent")
    if not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], got {density}; 0.005 selects half a percent")


def count_at(density: float, n: int) -> int:
    """Return how many of n entries a density selects: rounded down, at least one."""
    # a product like 0.29 * 100 falls just below its integer in binary; a part in 10^12 is no entry
    return max(1, math.floor(density * n * (1 + 1e-12)))


def _too_many(density: float | None, count: int, total: int, unscored: Mapping[str, Any] | None) -> str:
    """Say that more was asked for than can be selected, and by how much."""
    what, got = ("k", f"{count:,}") if density is None else ("density", f"{density}, which is {count:,}")
    named = f"; {', '.join(list(unscored)[:4])} and the like have no scores: exclude them" if unscored else ""
    return f"{what} must be at most the {total:,} selectable entries, got {got}, {count - total:,} too many{named}"


def _held(
    scores: Mapping[str, Tensor] | Paths, progress: bool
) -> AbstractContextManager[Mapping[str, Tensor | StoredScore]]:
    return nullcontext(scores) if isinstance(scores, Mapping) else opened(scores, progress)


def _selected(
    scores: Mapping[str, Tensor | StoredScore],
    count: int | None,
    exactly: bool,
    per_group: int | None,
    scope: Scope,
    structure: Structure | None,
    block: tuple[int, int] | None,
    views: Mapping[str, Layout],
) -> Selected:
    stored = {name: score for name, score in scores.items() if isinstance(score, StoredScore)}
    if stored and structure is None and scope in ("global", "layer", "tensor"):
        return largest_stored(stored, budgets(stored, count, per_group, scope))
    ends = {name: loaded(score).aminmax() for name, score in scores.items()}
    check_finite({name: (float(low), float(high)) for name, (low, high) in ends.items()})
    if structure is not None and count is not None:
        indices = largest_units(scores, count, exactly, scope, structure, block, views)
    else:
        indices = largest(scores, count, per_group, scope, block, views)
    lowest = min(
        (float(loaded(scores[name]).reshape(-1)[index.long()].min()), name)
        for name, index in indices.items()
        if index.numel()
    )
    return Selected(indices, max(float(high) for _, high in ends.values()), lowest)


def _check_reach(selected: Selected, *, units: bool) -> None:
    """Raise if no score tells anything, and warn if some selected entries have none. units: these may hold zeros."""
    lowest, name = selected.lowest
    if selected.highest == 0 and lowest == 0:
        raise ValueError(
            "every score is zero: no entry is better than another; check that the loss depends on the model"
        )
    if lowest == 0 and not units:
        warnings.warn(
            f"some selected entries score zero (in {name}): the density reaches beyond what the scores tell "
            "apart; ties were broken by position. Use a lower density or more samples, or exclude what scores zero.",
            stacklevel=3,
        )
