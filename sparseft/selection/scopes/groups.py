"""The largest scores of each group, exactly as many as its share of the budget."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from sparseft import ops  # noqa: F401  (registers torch.ops.sparseft)
from sparseft.selection.scopes.layouts import Layout
from sparseft.selection.scopes.shares import rounded_down, rounded_up, shares
from sparseft.selection.scopes.tiles import Structure, Tiles
from sparseft.selection.score_files import StoredScore, loaded

Scope = Literal["global", "layer", "tensor", "row", "column", "block"]
_NUMBERED = re.compile(r"(.*?\.)??\d+(?=\.|$)")


def check_groups(
    scope: str, structure: str | None, block: object, per_group: int | None, counted: bool
) -> tuple[int, int] | None:
    """Return the rows and columns of a block, or raise unless the options go together.

    counted: whether a density or a number of entries is given.
    """
    if scope not in get_args(Scope):
        raise ValueError(f"scope must be one of {', '.join(get_args(Scope))}, got {scope!r}")
    if structure is not None and structure not in get_args(Structure):
        raise ValueError(f"structure must be one of {', '.join(get_args(Structure))}, or None, got {structure!r}")
    if structure is not None and scope in get_args(Structure):
        raise ValueError(
            f"whole units (structure={structure!r}) compete in scope 'global', 'layer' or 'tensor', got {scope!r}"
        )
    if per_group is not None:
        _check_per_group(per_group, scope, structure, counted)
    return _checked_block(block, scope, structure)


def _check_per_group(per_group: object, scope: str, structure: str | None, counted: bool) -> None:
    if counted:
        raise ValueError(f"give one of density, k and per_group, got per_group={per_group} beside another")
    if not isinstance(per_group, int) or isinstance(per_group, bool):
        raise TypeError(f"per_group must be a whole number of entries, got {per_group!r}")
    if per_group < 1:
        raise ValueError(f"per_group must be at least 1, got {per_group}")
    if scope == "global" or structure is not None:
        raise ValueError(
            f"per_group counts single entries in groups, got scope {scope!r} and structure {structure!r}; give a "
            "scope of groups, or k"
        )


def _checked_block(block: object, scope: str, structure: str | None) -> tuple[int, int] | None:
    if "block" not in (scope, structure):
        if block is not None:
            raise ValueError(f"block goes with scope='block' or structure='block', got {block!r}")
        return None
    sides = (block, block) if isinstance(block, int) else block
    if not isinstance(sides, (tuple, list)) or len(sides) != 2 or not all(type(side) is int for side in sides):
        raise TypeError(f"block must be (rows, columns), or one number for both, got {block!r}; (1, 4), for instance")
    if min(sides) < 1:
        raise ValueError(f"block must have at least one row and one column, got {block!r}")
    return sides[0], sides[1]


def largest(
    scores: Mapping[str, Tensor | StoredScore],
    total: int | None,
    per_group: int | None,
    scope: Scope,
    block: tuple[int, int] | None,
    views: Mapping[str, Layout],
) -> dict[str, Tensor]:
    """Return index lists of `total` entries, shared among the groups of a scope; or of `per_group` in each.

    Args:
        scores: parameter name -> finite scores.
        total: number of entries. They are shared among parameters, or layers, by size, and a parameter's share among
            its rows, columns or blocks by size, both by largest remainders. Ties go to the first parameter or layer;
            inside a parameter to the group whose next score is the larger, then to the first.
        per_group: number of entries in each group, or all of a smaller one.
        scope: what the groups are.
        block: rows and columns of a block.
        views: parameter name -> layout; the usual one where it is missing.
    """
    found: dict[str, Tensor] = {}
    for names, count in budgets(scores, total, per_group, scope):
        if not count:
            continue
        if scope == "global" or scope == "layer" or scope == "tensor":
            found.update(zip(names, _together([loaded(scores[name]) for name in names], count), strict=True))
        else:
            (name,) = names
            view = views.get(name) or Layout.usual(scores[name].shape)
            found[name] = _by_tiles(loaded(scores[name]), Tiles(view, scope, block), count, per_group)
    return {name: found[name] for name in scores if name in found}


def budgets(
    scores: Mapping[str, Tensor | StoredScore], total: int | None, per_group: int | None, scope: Scope
) -> list[tuple[list[str], int]]:
    """Return the parameters that share a budget, and how many entries it is: of all rows of a parameter, say."""
    grouped = group_names(scores, scope)
    sizes = [sum(scores[name].numel() for name in names) for names in grouped]
    if total is not None:
        counts = shares(total, sizes)
    elif scope in ("layer", "tensor"):
        counts = [min(per_group or 0, size) for size in sizes]
    else:
        counts = sizes
    return list(zip(grouped, counts, strict=True))


def group_names(names: Iterable[str], scope: Scope) -> list[list[str]]:
    """Return the parameters that share a budget: all, those of a layer, or each by itself.

    Layers are told by the first numbered part of a name: "encoder.layer.3" in "encoder.layer.3.output.dense.weight".
    Names without a number are one group.
    """
    if scope == "global":
        return [list(names)]
    if scope != "layer":
        return [[name] for name in names]
    groups: dict[str, list[str]] = {}
    for name in names:
        numbered = _NUMBERED.match(name)
        groups.setdefault(numbered.group() if numbered else "", []).append(name)
    return list(groups.values())


def _together(scores: list[Tensor], count: int) -> list[Tensor]:
    """Return one index list a tensor: where the largest of all scores are."""
    indices, counts = torch.ops.sparseft.topk_indices(scores, count)
    return list(indices.split(counts.tolist()))


def _by_tiles(score: Tensor, tiles: Tiles, total: int, per_group: int | None) -> Tensor:
    """Return where the largest scores of each tile are, `total` in all, or `per_group` in each."""
    if tiles.count == 1:
        return _together([score], total if per_group is None else min(per_group, score.numel()))[0]
    groups, sizes = tiles.split(score, -math.inf), tiles.sizes(score.device)
    if per_group is not None:
        counts = sizes.clamp(max=per_group)
        bars, _ = _bars(groups, counts, tiles)
    else:
        counts, remainders = rounded_down(total, sizes)
        bars, following = _bars(groups, counts, tiles)
        more = rounded_up(remainders, following, total - int(counts.sum()))
        counts, bars = counts + more, torch.where(more, following, bars)
    chosen = torch.empty(groups.shape, dtype=torch.bool, device=score.device)
    for part in tiles.chunks():
        values, bar = groups[part].float(), bars[part, None]
        above, equal = values > bar, values == bar
        # of entries that equal the last one selected, the first
        short = counts[part, None] - above.sum(1, keepdim=True)
        chosen[part] = above | (equal & (equal.cumsum(1, dtype=torch.int32) <= short))
    return tiles.join(chosen).nonzero().flatten()


def _bars(groups: Tensor, counts: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Return the `counts`-th largest score of each group, infinite for none, and the next one: fp32."""
    bars, following = torch.empty(2, len(counts), device=groups.device).unbind()
    for part in tiles.chunks():
        most = min(int(counts[part].max()) + 1, tiles.size)
        top = groups[part].float().topk(most, dim=1).values
        # a bar nothing reaches before the first, and one that all have passed after the last
        top = torch.cat([torch.full_like(top[:, :1], math.inf), top, torch.full_like(top[:, :1], -math.inf)], 1)
        bars[part] = top.gather(1, counts[part, None]).flatten()
        following[part] = top.gather(1, counts[part, None] + 1).flatten()
    return bars, following
