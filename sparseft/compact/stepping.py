"""Leaves and weights follow each other at the steps of any torch optimizer."""

from __future__ import annotations

import contextlib
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
from sparseft.entries import SelectedEntries


@contextlib.contextmanager
def following(model: nn.Module, entries: Mapping[str, SelectedEntries]) -> Iterator[None]:
    """Before a step of any optimizer, take what was changed in the weights into the leaves; after it, the reverse."""
    own = {id(leaf): name for name, leaf in entries.items()}
    stepping: dict[str, SelectedEntries] = {}

    def with_gradients(optimizer: Optimizer) -> dict[str, SelectedEntries]:
        params = (param for group in optimizer.param_groups for param in group["params"])
        return {own[id(param)]: param for param in params if id(param) in own and param.grad is not None}

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        _check_leaves_in(optimizer, entries)
        leaves = with_gradients(optimizer)
        with torch._C.DisableTorchFunctionSubclass():
            for name, leaf in leaves.items():
                _check(model, name, leaf)
        if not _writes(optimizer):
            refresh(list(leaves.values()))
            stepping.update(leaves)

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not _writes(optimizer):
            # gradients may be freed in the step, or come about in it, in a closure
            write(list({**stepping, **with_gradients(optimizer)}.values()))
            stepping.clear()

    handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def refresh(leaves: Sequence[SelectedEntries]) -> None:
    """Take the weights' values into the leaves that no longer round to them: they were changed from outside."""
    if leaves:
        values = torch.ops.sparseft.gather(
            [leaf.dense.detach() for leaf in leaves], [leaf.positions for leaf in leaves]
        )
        for leaf, value in zip(leaves, values, strict=True):
            leaf.copy_(torch.where(leaf.to(value.dtype) == value, leaf, value.float()))


@torch.no_grad()
def write(leaves: Sequence[SelectedEntries]) -> None:
    """Round the leaves into the weights."""
    if leaves:
        weights = [leaf.dense.detach() for leaf in leaves]
        # exchanged with a copy, which is then dropped
        values = [leaf.detach().to(leaf.dense.dtype, copy=True) for leaf in leaves]
        torch.ops.sparseft.delta_swap_(weights, [leaf.positions for leaf in leaves], values)
        torch.autograd.graph.increment_version([leaf.dense for leaf in leaves])


def _writes(optimizer: Optimizer) -> bool:
    """Return whether an optimizer updates the weights behind leaves itself, as those of this package do."""
    return getattr(optimizer, "updates_dense", False)


def _check_leaves_in(optimizer: Optimizer, entries: Mapping[str, SelectedEntries]) -> None:
    """Raise if an optimizer has parameters whose gradients are compact, and none of their leaves: it cannot train."""
    params = {id(param) for group in optimizer.param_groups for param in group["params"]}
    frozen = [name for name, leaf in entries.items() if id(leaf.dense) in params]
    if frozen and not any(id(leaf) in params for leaf in entries.values()):
        raise RuntimeError(
            f"the optimizer has {frozen[0]} and not the leaf of its selected entries, which gets the gradients; make "
            "the optimizer inside compact_gradients, from mask.param_groups(model) or model.parameters()"
        )


def _check(model: nn.Module, name: str, leaf: SelectedEntries) -> None:
    """Raise unless the model still has the parameter that the leaf belongs to, as it was."""
    owner, _, attribute = name.rpartition(".")
    try:
        found = model.get_submodule(owner)._parameters.get(attribute)
    except AttributeError:
        found = None
    if found is not leaf.dense:
        raise RuntimeError(
            f"{name} was replaced while its gradients were compact; leave compact_gradients before changing the model"
        )
    now = leaf.dense.shape, leaf.dense.dtype, leaf.dense.device
    if now != leaf.made_for or leaf.device != leaf.dense.device:
        was, is_now = (f"{dtype} {list(shape)} on {device}" for shape, dtype, device in (leaf.made_for, now))
        raise RuntimeError(
            f"{name} was {was} and is {is_now}, its leaf on {leaf.device}: it was moved, resized or converted while "
            "its gradients were compact; leave compact_gradients before that"
        )
