"""A group's parameters, their gradients and their index lists.

A parameter may be the leaf of another's selected entries, of `compact_gradients`. Then it is that one's weights that a
step updates, with the leaf as their master, and the index list is where its entries lie in there.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparseft.entries import SelectedEntries, entries_of, is_leaf
from sparseft.index_lists import count, index_dtype, positions
from sparseft.mask import check_indices

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def weight(param: Tensor) -> Tensor:
    """Return the parameter whose weights a step changes: itself, but for a leaf."""
    return param.dense if is_leaf(param) else param


def values(param: Tensor, index: Tensor) -> Tensor:
    """Return the selected entries of a parameter, in its dtype: [k]."""
    return weight(param).detach().view(-1)[unpacked(param, index).long()]


def unpacked(param: Tensor, index: Tensor) -> Tensor:
    """Return the positions in a parameter's index list: int32 or int64 [k]."""
    return positions(index, weight(param).numel())


def entries(param: Tensor, index: Tensor) -> int:
    """Return how many entries the index list of a parameter has."""
    return count(index, weight(param).numel())


def take_master(leaf: SelectedEntries, master: Tensor) -> None:
    """Take the digits of a saved master into a leaf, where its weight is what the master rounds to."""
    weights = values(leaf, leaf.index_list)
    leaf.copy_(torch.where(master.to(weights.dtype) == weights, master, weights.float()))
    leaf.mark_written()


@dataclasses.dataclass
class Trained:
    """The parameters of a group that have a gradient, the gradients, index lists, and places in the group."""

    params: list[Tensor] = dataclasses.field(default_factory=list)
    grads: list[Tensor] = dataclasses.field(default_factory=list)
    indices: list[Tensor] = dataclasses.field(default_factory=list)
    places: list[int] = dataclasses.field(default_factory=list)

    @property
    def k(self) -> list[int]:
        """How many entries each index list has."""
        return [entries(param, index) for param, index in zip(self.params, self.indices, strict=True)]


def trained(group: Mapping[str, Any], frozen: Collection[int]) -> Trained:
    """Return what a step works on; warn of selected entries that were frozen since they were added.

    frozen: ids of the parameters that were so before.
    """
    found = Trained()
    for place, (param, index) in enumerate(zip(group["params"], group["indices"], strict=True)):
        grad = param.grad
        if grad is not None:
            found.params.append(param)
            found.grads.append(grad)
            found.indices.append(index)
            found.places.append(place)
        elif (
            not param.requires_grad and id(param) not in frozen and entries_of(param) is None and entries(param, index)
        ):
            warnings.warn(
                f"a parameter of shape {list(param.shape)} with {entries(param, index)} selected entries is frozen "
                "(requires_grad=False) and does not train; unfreeze it, or select again without it",
                stacklevel=4,
            )
    return found


def checked_indices(params: list[Tensor], indices: Sequence[Tensor | None] | None) -> list[Tensor]:
    """Return one index list a parameter, on its device, in its dtype; all entries where there is no list."""
    for param in map(weight, params):
        if param.dtype not in _FLOATS or not param.is_contiguous():
            raise TypeError(
                f"parameters must be contiguous and fp32, bf16 or fp16, got {param.dtype} {param.stride()}"
            )
    if indices is None:
        indices = [None] * len(params)
    if len(indices) != len(params):
        raise ValueError(f"a group needs one index list a parameter, got {len(indices)} for {len(params)} parameters")
    return [_checked_index(i, param, index) for i, (param, index) in enumerate(zip(params, indices, strict=True))]


def _checked_index(i: int, param: Tensor, index: Tensor | None) -> Tensor:
    if is_leaf(param):
        if index is not None and not _same(index, param):
            raise ValueError(
                f"parameter {i} of the group is a leaf of compact gradients, whose entries are not those of its index "
                "list; enter compact_gradients with the mask that the list is from"
            )
        return param.index_list
    if index is None:
        index = torch.arange(param.numel(), dtype=index_dtype(param.numel()), device=param.device)
    return check_indices(f"parameter {i} of the group", index, param.numel()).to(param.device)


def _same(index: Tensor, leaf: SelectedEntries) -> bool:
    """Return whether an index list, packed or not, is that of a leaf."""
    checked = check_indices("a leaf", index, leaf.dense.numel())
    return torch.equal(checked.to(leaf.device), leaf.index_list)


def _fits(index: Tensor, param: Tensor) -> bool:
    try:
        check_indices("a copy", index, param.numel())
    except ValueError:
        return False
    return True


def untie_copies(group: dict[str, Any], state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Have a group train the copies of leaves, which are tied to no weight: all of each."""
    for i, (param, index) in enumerate(zip(group["params"], group["indices"], strict=True)):
        # k positions, sorted and unique, that are all below k are all there are
        if not is_leaf(param) and not _fits(index, param):
            group["indices"][i] = _checked_index(i, param, None)
            if "pretrained" in state.get(param, {}):
                state[param]["pretrained"] = state[param]["pretrained"].to(param.dtype)
