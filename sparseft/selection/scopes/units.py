"""Whole rows, columns or blocks, by the mean of their scores: masks like any other, whose entries lie together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparseft.selection.scopes.groups import Scope, group_names
from sparseft.selection.scopes.layouts import Layout
from sparseft.selection.scopes.shares import shares
from sparseft.selection.scopes.tiles import Structure, Tiles
from sparseft.selection.score_files import StoredScore, loaded


def largest_units(
    scores: Mapping[str, Tensor | StoredScore],
    total: int,
    exactly: bool,
    scope: Scope,
    structure: Structure,
    block: tuple[int, int] | None,
    views: Mapping[str, Layout],
) -> dict[str, Tensor]:
    """Return index lists of the best units, taken in order until the next one does not fit into the budget.

    Units are ranked by their score an entry, so that a long row, which takes more of the budget, needs a larger sum.
    Ties go to the first parameter, then to the first unit.

    Args:
        scores: parameter name -> finite scores.
        total: number of entries, shared among layers or tensors by size.
        exactly: whether fewer than `total` entries are an error.
        scope: among which units they are ranked: "global", "layer" or "tensor".
        structure: what a unit is.
        block: rows and columns of a block.
        views: parameter name -> layout; the usual one where it is missing.

    Raises:
        ValueError: the budget holds no unit, or `exactly` that many entries cannot be met.
    """
    tiles = {
        name: Tiles(views.get(name) or Layout.usual(score.shape), structure, block) for name, score in scores.items()
    }
    grouped = group_names(scores, scope)
    budgets = shares(total, [sum(scores[name].numel() for name in names) for names in grouped])
    found: dict[str, Tensor] = {}
    short: list[str] = []
    for names, budget in zip(grouped, budgets, strict=True):
        means = torch.cat([_means(loaded(scores[name]), tiles[name]) for name in names])
        sizes = torch.cat([tiles[name].sizes(means.device) for name in names])
        order = means.sort(descending=True, stable=True).indices
        reached = sizes[order].cumsum(0)
        kept = int((reached <= budget).sum())
        chosen = torch.zeros_like(means, dtype=torch.bool)
        chosen[order[:kept]] = True
        for name, units in zip(names, chosen.split([tiles[name].count for name in names]), strict=True):
            entries = units[:, None].expand(-1, tiles[name].size)
            found[name] = tiles[name].join(entries).nonzero().flatten()
        taken = int(reached[kept - 1]) if kept else 0
        if taken < budget:
            where = f"{names[0]}{' and others' if len(names) > 1 else ''}"
            short.append(
                f"in {where} {taken:,} of {budget:,} entries, the next {structure} having {sizes[order[kept]]:,}"
            )
    if exactly and short:
        raise ValueError(
            f"k={total:,} entries must be whole {structure}s, but these take {short[0]} ({len(short)} such); "
            "choose another k, or a density, which takes what fits"
        )
    if not any(index.numel() for index in found.values()):
        raise ValueError(f"the budget must hold a whole {structure}, but these take {short[0]}; raise it")
    return found


def _means(score: Tensor, tiles: Tiles) -> Tensor:
    """Return each unit's score an entry: fp32 [units], summed in fp64."""
    groups = tiles.split(score, 0.0)
    sums = [groups[part].sum(1, dtype=torch.float64) for part in tiles.chunks()]
    return (torch.cat(sums) / tiles.sizes(score.device)).float()
