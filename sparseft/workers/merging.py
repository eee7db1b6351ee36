"""One delta of several that were trained from the same base."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sparseft.delta import Delta, check_values
from sparseft.mask import Mask

Overlap = Literal["error", "mean"]


def merge(
    deltas: Iterable[Delta],
    *,
    overlap: Overlap = "error",
    weights: Sequence[float] | None = None,
    partial: bool = False,
) -> Delta:
    """Put together what several workers learned: the base with the result is the base with every worker's changes.

    Values are taken over bit for bit. What several workers changed takes the mean of their values, computed in fp64
    in the order given and rounded once: dense parameters always, selected entries with `overlap="mean"`.

    Args:
        deltas: of the same base, which is compared where masks have fingerprints, and the same selectable and dense
            parameters.
        overlap: what happens to entries that are in several deltas: "error", or "mean".
        weights: one a delta, positive, of the means; equal if left out. They do not touch what one worker changed.
        partial: accept that deltas of masks from one `split` are not all there. The entries of those missing stay as
            they are in the base.

    Returns:
        A delta of the union of the masks, on the CPU: to apply, to save, to merge again. In its info is what was the
        same in all.

    Raises:
        TypeError: one is not a Delta, or a weight no number.
        ValueError: there is none; they are of other bases, parameters or dtypes; a value is NaN or infinite; entries
            overlap; a worker is missing; or weights do not fit.
    """
    if isinstance(deltas, Delta):
        raise TypeError("merge takes a list of deltas, got one Delta; put it in a list")
    deltas = list(deltas)
    _check_together(deltas)
    shares = _checked_weights(weights, len(deltas))
    if overlap not in get_args(Overlap):
        raise ValueError(f'overlap must be "error" or "mean", got {overlap!r}')
    first = deltas[0].mask
    info = _common_info([delta.mask for delta in deltas], partial)
    indices, values = {}, {}
    for name in first.shapes:
        owners = [place for place, delta in enumerate(deltas) if name in delta.mask]
        if owners:
            lists = [deltas[place].mask[name].cpu() for place in owners]
            found = [deltas[place].values[name].cpu() for place in owners]
            indices[name], values[name], shared = _joined(lists, found, [shares[place] for place in owners])
            if shared and overlap == "error":
                raise ValueError(
                    f"deltas must be disjoint, got {shared:,} entries of {name} in several of them; merge each delta "
                    "once, train the masks of one split, or take the mean of what overlaps (overlap='mean')"
                )
    dense = {name: _mean([delta.dense[name].cpu() for delta in deltas], shares) for name in first.dense}
    mask = Mask(
        indices, first.shapes, dense=first.dense, aliases=first.aliases, info=info, fingerprint=first.fingerprint
    )
    return Delta(mask, values, dense)


def _joined(lists: list[Tensor], values: list[Tensor], shares: list[float]) -> tuple[Tensor, Tensor, int]:
    """Return the union of index lists, its values, and how many entries are in several lists, which get the mean."""
    positions, slots, counts = torch.cat(lists).unique(return_inverse=True, return_counts=True)
    flat = torch.cat(values)
    joined = flat.new_empty(positions.numel())
    joined[slots] = flat
    several = counts > 1
    if bool(several.any()):
        share = torch.cat([torch.full((len(v),), s, dtype=torch.float64) for v, s in zip(values, shares, strict=True)])
        total, mass = torch.zeros(2, positions.numel(), dtype=torch.float64)
        total.index_add_(0, slots, share * flat.double())
        mass.index_add_(0, slots, share)
        joined[several] = (total[several] / mass[several]).to(flat.dtype)
    return positions, joined, int(several.sum())


def _mean(wholes: list[Tensor], shares: list[float]) -> Tensor:
    """Return the weighted mean of tensors, in their dtype; of one tensor, a copy."""
    if len(wholes) == 1:
        return wholes[0].clone()
    total = shares[0] * wholes[0].double()
    for share, whole in zip(shares[1:], wholes[1:], strict=True):
        total += share * whole.double()
    return (total / math.fsum(shares)).to(wholes[0].dtype)


def _check_together(deltas: Sequence[Delta]) -> None:
    """Raise unless deltas are of one base, with the same selectable and dense parameters."""
    if not deltas:
        raise ValueError("there is nothing to merge: give at least one delta")
    for delta in deltas:
        if not isinstance(delta, Delta):
            raise TypeError(f"merge takes deltas, got {type(delta).__name__}; Delta.load reads one from a file")
    dtypes: dict[str, torch.dtype] = {}
    for place, delta in enumerate(deltas):
        for what in ("shapes", "dense"):
            names = _differing(getattr(deltas[0].mask, what), getattr(delta.mask, what))
            if names:
                raise ValueError(
                    f"deltas must have the same {'selectable' if what == 'shapes' else 'dense'} parameters, got "
                    f"others in deltas[{place}] than in deltas[0]: {names}; split one mask for all workers"
                )
        names = _differing(deltas[0].mask.fingerprint, delta.mask.fingerprint)
        if names:
            raise ValueError(
                f"deltas must be of the same base, got other base weights in deltas[{place}] than in deltas[0]: "
                f"{names}; train all workers of a round from the same weights"
            )
        for name, value in (*delta.values.items(), *delta.dense.items()):
            if value.dtype != dtypes.setdefault(name, value.dtype):
                raise ValueError(
                    f"deltas must have the same dtypes, got {name} as {value.dtype} in deltas[{place}] and as "
                    f"{dtypes[name]} before; train all workers in one dtype"
                )
        check_values(delta, f" of deltas[{place}]")


def _differing(wanted: Mapping[str, Any], got: Mapping[str, Any]) -> str:
    names = sorted(name for name in {*wanted, *got} if wanted.get(name) != got.get(name))
    return ", ".join(names[:4]) + (f", and {len(names) - 4} more" if len(names) > 4 else "")


def _checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    if any(isinstance(weight, bool) or not isinstance(weight, Real) for weight in weights):
        raise TypeError(f"weights must be {count} positive numbers, one a delta, got {list(weights)}")
    shares = [float(weight) for weight in weights]
    if len(shares) != count or not all(0 < share < math.inf for share in shares):
        raise ValueError(f"weights must be {count} positive numbers, one a delta, got {list(weights)}")
    return shares


def _common_info(masks: Sequence[Mask], partial: bool) -> dict[str, Any]:
    """Return what is the same in all, and which parts of a split are there, or raise if not all of them are."""
    infos = [mask.info for mask in masks]
    common = {key: value for key, value in infos[0].items() if all(info.get(key) == value for info in infos)}
    parts = [info["workers"] for info in infos if info.get("workers")]
    if len(parts) < len(masks):
        return common
    dealt = {part.get("mask") for part in parts}
    if None not in dealt:
        _check_dealt(masks, parts, partial)
    elif not partial:
        _check_numbers(parts)
    if len(dealt) > 1:
        return common
    whole = {key: parts[0][key] for key in ("mask", "entries") if key in parts[0]}
    counts = {part.get("of") for part in parts}
    if len(counts) == 1 and None not in counts:
        numbers = {number for part in parts for number in part["parts"]}
        whole = {"of": counts.pop(), "parts": sorted(numbers), **whole}
    return {**common, "workers": whole} if whole else common


def _check_dealt(masks: Sequence[Mask], parts: Sequence[Mapping[str, Any]], partial: bool) -> None:
    """Raise unless all entries of the mask that was dealt are there, whoever has them."""
    found: dict[str, Mask] = {}
    for mask, part in zip(masks, parts, strict=True):
        found[part["mask"]] = found[part["mask"]].union(mask) if part["mask"] in found else mask
    entries = {part["mask"]: part["entries"] for part in parts}
    lacking = {which: entries[which] - mask.k for which, mask in found.items() if mask.k < entries[which]}
    if lacking and len(found) > 1:
        raise ValueError(
            f"deltas must be of the parts of one mask, got parts of {len(found)}, and not all of each; merge those "
            "that one split made"
        )
    if lacking and not partial:
        _check_numbers(parts)
        (number,), (of,) = lacking.values(), entries.values()
        raise ValueError(
            f"the deltas of all workers of a split must be there, got none of {number:,} of the {of:,} entries dealt: "
            "these parts are of two splits, or of parts that were split again; add the others, or have their entries "
            "stay as they are in the base (partial)"
        )


def _check_numbers(parts: Sequence[Mapping[str, Any]]) -> None:
    """Raise unless the worker of every number is there; where they are not of the same many, numbers say nothing."""
    counts = {part.get("of", 0) for part in parts}
    if len(counts) > 1:
        return
    (of,) = counts
    numbers = [number for part in parts for number in part.get("parts", ())]
    missing = [number for number in range(of) if number not in numbers]
    if missing:
        twice = sorted({number for number in numbers if numbers.count(number) > 1})
        raise ValueError(
            f"the deltas of all {of} workers of a split must be there, got none of {missing}"
            f"{f' and several of {twice}' if twice else ''}; add them, or have their entries stay as they are in the "
            "base (partial)"
        )
