"""States of entries that stop training for a while: what `set_mask` drops, kept for their return."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparseft.mask import Mask
from sparseft.optim.mask_change import Move
from sparseft.optim.parameters import unpacked
from sparseft.optim.states import carried_state, fill_state, make_state

if TYPE_CHECKING:
    from sparseft.optim.base import SparseOptimizer

# parameter's name -> entries, int32 or int64 [k], and their state, as an optimizer has it
LeftOut = dict[str, tuple[Tensor, dict[str, Any]]]


@torch.no_grad()
def left_out_states(optimizer: SparseOptimizer, mask: Mask, model: nn.Module) -> LeftOut:
    """Return the states of the entries that another mask leaves out, to be taken before it is set."""
    kept: LeftOut = {}
    for name, parameter, names, old in _trained(optimizer, model):
        state = optimizer.state.get(parameter)
        if state and name in mask.shapes:
            new = mask[name].to(old.device) if name in mask else old[:0]
            left = old[~Move.between(new, old).stays]
            if left.numel():
                kept[name] = left, carried_state(state, names, parameter, left, Move.between(old, left))
    return kept


@torch.no_grad()
def return_states(optimizer: SparseOptimizer, kept: LeftOut, model: nn.Module) -> None:
    """Give entries their states of before, after a mask was set that has them all."""
    for name, parameter, names, index in _trained(optimizer, model):
        if name in kept:
            left, state = kept[name]
            if optimizer.state.get(parameter):
                fill_state(optimizer.state[parameter], state, names, Move.between(index, left).source)
            else:
                optimizer.state[parameter] = carried_state(state, names, parameter, index, Move.between(left, index))


@torch.no_grad()
def new_state(optimizer: SparseOptimizer, parameter: Tensor, index: Tensor) -> dict[str, Any]:
    """Return the state that some entries of a parameter begin with, made as all that is left out is.

    index: int32 or int64 [k], positions.
    """
    homes = {param: place for place, g in enumerate(optimizer.param_groups) for param in g["params"]}
    # one that trains nothing now is in no group: that to which it comes back
    group = optimizer.param_groups[homes.get(parameter, getattr(optimizer, "_homes", {}).get(parameter, 0))]
    state: dict[str, Any] = {}
    make_state(state, group, optimizer._state_names(group), parameter, index)
    return state


def _trained(
    optimizer: SparseOptimizer, model: nn.Module
) -> Iterator[tuple[str, nn.Parameter, tuple[str, ...], Tensor]]:
    """Yield name, parameter, names of moments and positions of what an optimizer trains of a model."""
    found = {name_of: name for name, name_of in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter, index in zip(group["params"], group["indices"], strict=True):
            if parameter in found:
                yield found[parameter], parameter, optimizer._state_names(group), unpacked(parameter, index)
