"""Leaves and weights follow each other at the steps of any torch optimizer."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from sparseft import ops  # noqa: F401  (registers torch.ops.sparseft)
from sparseft.entries import SelectedEntries, entries_of, is_leaf

# Of optimizers in the middle of a step, by id: the leaves that had gradients before it.
_stepping: dict[int, list[SelectedEntries]] = {}
# Parameters that train whole in a context that is entered, by id: their model and name.
_whole: dict[int, tuple[nn.Module, str]] = {}


@contextlib.contextmanager
def following(
    model: nn.Module, entries: Mapping[str, SelectedEntries], whole: Mapping[str, nn.Parameter]
) -> Iterator[None]:
    """Before a step of any optimizer, take what was changed in the weights into the leaves; after it, the reverse.

    whole: the parameters that train as they are, by name; held, so that their ids stay theirs.
    """
    _watch_optimizers()
    for name, leaf in entries.items():
        leaf.place = model, name
    _whole.update({id(parameter): (model, name) for name, parameter in whole.items()})
    try:
        yield
    finally:
        write_changed(list(entries.values()))
        for leaf in entries.values():
            leaf.place = None
        for parameter in whole.values():
            del _whole[id(parameter)]


@functools.cache
def _watch_optimizers() -> None:
    """Watch all optimizers from now on: one whose leaves are not active any more is still to be refused."""
    register_optimizer_step_pre_hook(_before)
    register_optimizer_step_post_hook(_after)


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    leaves = [param for param in params if is_leaf(param)]
    with torch._C.DisableTorchFunctionSubclass():
        for leaf in leaves:
            _check(leaf)
        for param in params:
            if id(param) in _whole:
                _check_in_place(param, *_whole[id(param)])
    if not leaves:
        _check_not_behind(params)
    _warn_of_frozen(leaves)
    # what was changed by hand since the last step or forward pass, as sharpness-aware steps do
    write_changed(leaves)
    if leaves and not _writes(optimizer):
        _check_values(leaves)
        refresh(leaves)
        _stepping[id(optimizer)] = [leaf for leaf in leaves if leaf.grad is not None]


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if id(optimizer) in _stepping:
        # gradients may be freed in the step, or come about in it, in a closure
        params = (param for group in optimizer.param_groups for param in group["params"])
        now = [param for param in params if is_leaf(param) and param.grad is not None]
        write(list({id(leaf): leaf for leaf in (*_stepping.pop(id(optimizer)), *now)}.values()))


@torch.no_grad()
def refresh(leaves: Sequence[SelectedEntries]) -> None:
    """Take the weights' values into the leaves that no longer round to them: they were changed from outside."""
    leaves = [leaf for leaf in leaves if leaf.has_values]
    if leaves:
        weights = [leaf.dense.detach() for leaf in leaves]
        values = torch.ops.sparseft.gather(weights, [leaf.index_list for leaf in leaves])
        for leaf, value in zip(leaves, values, strict=True):
            leaf.copy_(torch.where(leaf.to(value.dtype) == value, leaf, value.float()))
            leaf.mark_written()


@torch.no_grad()
def write(leaves: Sequence[SelectedEntries]) -> None:
    """Round the leaves into the weights."""
    leaves = [leaf for leaf in leaves if leaf.has_values]
    if leaves:
        weights = [leaf.dense.detach() for leaf in leaves]
        # exchanged with a copy, which is then dropped
        values = [leaf.detach().to(leaf.dense.dtype, copy=True) for leaf in leaves]
        torch.ops.sparseft.delta_swap_(weights, [leaf.index_list for leaf in leaves], values)
        torch.autograd.graph.increment_version([leaf.dense for leaf in leaves])
        for leaf in leaves:
            leaf.mark_written()


def write_changed(leaves: Sequence[SelectedEntries]) -> None:
    """Round those leaves into the weights that were changed outside of a step, or in the middle of one."""
    write([leaf for leaf in leaves if leaf.changed])


def _writes(optimizer: Optimizer) -> bool:
    """Return whether an optimizer updates the weights behind leaves itself, as those of this package do."""
    return getattr(optimizer, "updates_dense", False)


def _check_not_behind(params: Sequence[Any]) -> None:
    """Raise if parameters have compact gradients and their optimizer has none of the leaves: it cannot train them."""
    if any(entries_of(param) is not None for param in params):
        raise RuntimeError(
            "the optimizer has parameters whose gradients are compact, and not the leaves of their selected entries, "
            "which get the gradients; make the optimizer inside compact_gradients, from mask.param_groups(model) or "
            "model.parameters(); or, for an optimizer of this package, call set_mask(mask, model) inside"
        )


def _check_values(leaves: Sequence[SelectedEntries]) -> None:
    """Raise unless leaves hold values, which optimizers of other packages train."""
    if not all(leaf.has_values for leaf in leaves):
        raise RuntimeError(
            "leaves without values are for optimizers of this package, which update the weights themselves, got "
            "another one; use one of sparseft's, or compact_gradients with values=True"
        )


def _check(leaf: SelectedEntries) -> None:
    """Raise unless the leaf's context is entered, and its model still has its parameter, as it was."""
    if leaf.place is None:
        raise RuntimeError(
            f"the optimizer has a leaf of {leaf.numel()} selected entries whose compact_gradients was left, or is of "
            "another mask; enter it again, make another optimizer inside, or call set_mask(mask, model) inside"
        )
    model, name = leaf.place
    _check_in_place(leaf.dense, model, name)
    now = leaf.dense.shape, leaf.dense.dtype, leaf.dense.device
    if now != leaf.made_for or leaf.device != leaf.dense.device:
        was, is_now = (f"{dtype} {list(shape)} on {device}" for shape, dtype, device in (leaf.made_for, now))
        raise RuntimeError(
            f"{name} was {was} and is {is_now}, its leaf on {leaf.device}: it was moved, resized or converted while "
            "its gradients were compact; leave compact_gradients before that"
        )


def _check_in_place(parameter: Any, model: nn.Module, name: str) -> None:
    """Raise unless a model has a parameter where it was when its context was entered."""
    owner, _, attribute = name.rpartition(".")
    try:
        found = model.get_submodule(owner)._parameters.get(attribute)
    except AttributeError:
        found = None
    if found is not parameter:
        raise RuntimeError(
            f"{name} was replaced inside compact_gradients, and would not train; leave the context before changing "
            "the model"
        )


def _warn_of_frozen(leaves: Sequence[SelectedEntries]) -> None:
    """Warn of leaves that do not train although their weights do."""
    places = (leaf.place for leaf in leaves if not leaf.requires_grad and leaf.dense.requires_grad)
    names = [place[1] for place in places if place is not None]
    if names:
        warnings.warn(
            f"selected entries of {len(names)} parameters, {names[0]} the first, are frozen and their parameters are "
            "not; freeze and unfreeze parameters: their selected entries follow, which the last module's parameters() "
            "has for the whole model",
            stacklevel=5,
        )
