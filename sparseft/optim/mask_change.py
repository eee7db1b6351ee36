"""Changing which entries an optimizer trains while it trains: what stays keeps its state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.entries import is_leaf
from sparseft.mask import Mask
from sparseft.optim.parameters import weight


@dataclasses.dataclass
class Member:
    """A parameter in a group, as a new mask wants it. `before` is what the group holds now for the same weight."""

    param: Tensor
    indices: Tensor | None
    name: str | None
    before: Tensor | None = None


@dataclasses.dataclass
class Move:
    """Where the entries of a new index list were in the old one.

    Attributes:
        stays: bool [k], entries that were selected before.
        source: int64, positions of those in the old list.
        nowhere: whether the lists are the same.
    """

    stays: Tensor
    source: Tensor
    nowhere: bool

    @classmethod
    def between(cls, old: Tensor, new: Tensor) -> Move:
        """Compare two index lists, both sorted and unique."""
        if not old.numel():
            return cls(torch.zeros_like(new, dtype=torch.bool), new.new_empty(0, dtype=torch.int64), not new.numel())
        if _is_beginning(old):
            stays = new < old.numel()
            return cls(stays, new[stays].long(), torch.equal(old, new))
        if _is_beginning(new):
            inside = old[old < new.numel()].long()
            stays = torch.zeros_like(new, dtype=torch.bool).index_fill_(0, inside, True)
            return cls(stays, torch.arange(inside.numel(), device=new.device), torch.equal(old, new))
        slot = torch.searchsorted(old, new).clamp_(max=old.numel() - 1)
        stays = old[slot] == new
        return cls(stays, slot[stays], torch.equal(old, new))

    def carry(self, values: Tensor, fresh: Tensor) -> Tensor:
        """Return `fresh`, one value an entry of the new list, with the values of entries that stay."""
        fresh[self.stays] = values[self.source]
        return fresh


def _is_beginning(positions: Tensor) -> bool:
    """Return whether a list, sorted and unique, is 0, 1, 2, ...: of all entries, as a rule."""
    return positions.numel() > 0 and int(positions[-1]) == positions.numel() - 1


def members(
    groups: Sequence[Mapping[str, Any]], homes: Mapping[Tensor, int], mask: Mask, model: nn.Module
) -> list[list[Member]]:
    """Return what a new mask makes of each group.

    A parameter stays in its group; one that is new joins the group of its kind, `selected` or `dense`, or the first;
    one of the mask's model with nothing selected leaves. What the mask does not know stays as it is. Parameters come
    in the mask's order, as in an optimizer that is built from it.

    homes: weights that left before -> the number of their group, to which they come back.

    Raises:
        ValueError: the mask is of another model, a parameter of it is frozen, or the optimizer has none of them.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    known = {*mask.shapes, *mask.dense}
    owners = {id(weight(param)): (g, param) for g, group in enumerate(groups) for param in group["params"]}
    result: list[list[Member]] = [[] for _ in groups]
    for g, group in enumerate(groups):
        labels = group.get("param_names", [None] * len(group["params"]))
        for param, index, label in zip(group["params"], group["indices"], labels, strict=True):
            if names.get(id(weight(param))) not in known:
                result[g].append(Member(param, index, label, param))
    kinds = [group.get("name") for group in groups]
    found = False
    for wanted in mask.param_groups(model):
        lists = wanted.get("indices") or [None] * len(wanted["params"])
        kind = kinds.index(wanted["name"]) if wanted["name"] in kinds else 0
        for param, index in zip(wanted["params"], lists, strict=True):
            g, before = owners.get(id(weight(param)), (homes.get(weight(param), kind), None))
            found |= before is not None
            result[g].append(Member(param, index, names[id(weight(param))], before))
    if not found:
        raise ValueError(
            f"the optimizer trains none of the parameters of {mask}; build it from a mask of the model it is to train"
        )
    return result


def carry_leaf(old: Tensor, new: Tensor, move: Move) -> None:
    """Give a leaf of selected entries the digits that another has of them and a 16-bit weight does not."""
    if not (is_leaf(old) and is_leaf(new)):
        return
    if old is not new and old.is_master and new.is_master:
        kept = move.carry(old.detach(), new.detach().clone())
        dtype = new.dense.dtype
        new.detach().copy_(torch.where(kept.to(dtype) == new.to(dtype), kept, new.detach()))
