"""What is changed in a model while its gradients are compact: each change a context that takes itself back."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from sparseft.compact.parameter import CompactParameter
from sparseft.compact.selection import Selection
from sparseft.compact.stepping import refresh
from sparseft.entries import SelectedEntries, entries_of, is_leaf
from sparseft.mask import Mask

_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"  # where DistributedDataParallel looks
_PREFIX = "selected/"  # of the leaves' names: they have no dots, and no other parameter's name has a slash


@contextlib.contextmanager
def rest_frozen(model: nn.Module, mask: Mask) -> Iterator[None]:
    """Freeze what the mask leaves out; put gradients aside but for those of parameters that train whole."""
    before = {name: (p, p.requires_grad, p.grad) for name, p in model.named_parameters() if name not in mask.dense}
    mask.freeze_rest(model)
    for parameter, _, _ in before.values():
        parameter.grad = None
    try:
        yield
    finally:
        now = dict(model.named_parameters())
        for name, (parameter, required, grad) in before.items():
            # what the mask leaves out may have been replaced; what it selects was not frozen here
            if name not in mask:
                parameter.requires_grad_(required)
                now.get(name, parameter).requires_grad_(required)
            _put_back(parameter, grad)


def _put_back(parameter: nn.Parameter, grad: torch.Tensor | None) -> None:
    # a parameter that was resized or converted since cannot have its gradient of before
    if grad is None or (grad.shape, grad.dtype, grad.device) == (parameter.shape, parameter.dtype, parameter.device):
        parameter.grad = grad


@contextlib.contextmanager
def made_compact(parameter: nn.Parameter, selection: Selection) -> Iterator[None]:
    """Pass the parameter's gradients to its leaf.

    It goes on requiring gradients: what is done where no `__torch_function__` is asked, as in an autograd.Function of
    somebody else, finds a parameter like any other, and leaves a dense gradient, which is gathered and freed.
    """
    # torch.utils.swap_tensors, which would exchange classes and attributes too, refuses tensors with weak references
    referenced = weakref.ref(parameter), weakref.ref(selection.entries)
    required = parameter.requires_grad
    # only what requires gradients takes the hook; it may do so later
    handle = parameter.requires_grad_().register_post_accumulate_grad_hook(_gather_gradient)
    parameter.requires_grad_(required)
    parameter.__class__ = CompactParameter
    parameter.selection = selection  # type: ignore[attr-defined]
    parameter.selected_entries = selection.entries  # type: ignore[attr-defined]
    try:
        yield
    finally:
        handle.remove()
        del referenced, parameter.selection, parameter.selected_entries  # type: ignore[attr-defined]
        parameter.__class__ = nn.Parameter


def _gather_gradient(parameter: torch.Tensor) -> None:
    grad, parameter.grad = parameter.grad, None
    leaf = entries_of(parameter)
    if grad is not None and leaf is not None and leaf.requires_grad:
        (selected,) = torch.ops.sparseft.gather([grad.contiguous()], [leaf.index_list])
        # through autograd, for those who wait for the leaf's gradient
        torch.autograd.backward([leaf], [selected.to(leaf.dtype)])


@contextlib.contextmanager
def hidden_from_ddp(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Have DDP average the gradients of the leaves, and none of the parameters that they belong to."""
    before = getattr(model, _DDP_IGNORES, None)
    setattr(model, _DDP_IGNORES, [*(before or ()), *names])
    try:
        yield
    finally:
        if before is None:
            delattr(model, _DDP_IGNORES)
        else:
            setattr(model, _DDP_IGNORES, before)


@contextlib.contextmanager
def leaves_registered(
    model: nn.Module, entries: Mapping[str, SelectedEntries], required: Mapping[str, bool]
) -> Iterator[None]:
    """Register the leaves as parameters of the model, which files and copies of it do not have.

    They are the last module's, so that they come after all others: who goes through the parameters of a model and of
    its copy side by side finds the same ones.
    """
    owner = list(model.modules())[-1]
    names = {_PREFIX + name.replace(".", "/"): leaf for name, leaf in entries.items()}
    for name, leaf in names.items():
        owner.register_parameter(name, leaf)
    handles = [
        owner.register_state_dict_post_hook(_hide),
        owner.register_load_state_dict_pre_hook(_keep),
        owner.register_load_state_dict_post_hook(_follow),
    ]
    rest = {name: flag for name, flag in required.items() if name not in entries}
    model.__deepcopy__ = _Copier(model, owner, rest)  # type: ignore[assignment, operator, unused-ignore]
    try:
        yield
    finally:
        del model.__deepcopy__
        for handle in handles:
            handle.remove()
        for name in names:
            owner._parameters.pop(name, None)


def _leaves(module: nn.Module) -> dict[str, SelectedEntries]:
    return {name: p for name, p in module._parameters.items() if is_leaf(p)}


def _hide(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in _leaves(module):
        state_dict.pop(prefix + name, None)


def _keep(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Have a module load the leaves it has, as they are."""
    for name, leaf in _leaves(module).items():
        state_dict[prefix + name] = leaf


def _follow(module: nn.Module, incompatible: Any) -> None:
    """Take over the weights that were loaded, which are all there when the last module has its own."""
    refresh(list(_leaves(module).values()))


@contextlib.contextmanager
def replacements_followed(model: nn.Module, mask: Mask, entries: Mapping[str, SelectedEntries]) -> Iterator[None]:
    """Have what trains take the memory of a parameter that is registered in its place, and stay.

    Loading with `assign=True` and `module.weight = nn.Parameter(...)` then change what a parameter holds, and neither
    the parameter nor the leaf, which optimizers have.
    """
    trained = {name: p for name, p in model.named_parameters() if name in mask or name in mask.dense}

    def follow(module: nn.Module, key: str, new: nn.Parameter) -> nn.Parameter | None:
        registered = module._parameters.get(key)
        for name, old in trained.items():
            if old is registered and old is not new:
                _check_replacement(model, name, old, new)
                old.data = new.data
                old.requires_grad_(new.requires_grad)
                torch.autograd.graph.increment_version(old)
                refresh([entries[name]] if name in entries else [])
                return old
        return None

    handle = register_module_parameter_registration_hook(follow)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _check_replacement(model: nn.Module, name: str, old: nn.Parameter, new: nn.Parameter) -> None:
    """Raise unless a parameter can go on with the memory of another."""
    remedy = "copy into it, load without assign=True, or leave compact_gradients before that"
    if type(new) is not nn.Parameter:
        raise RuntimeError(
            f"{name} trains in compact_gradients and can be replaced by a plain parameter only, got "
            f"{type(new).__name__}; {remedy}"
        )
    if (new.dtype, new.shape, new.device) != (old.dtype, old.shape, old.device) or not new.is_contiguous():
        raise RuntimeError(
            f"{name} trains in compact_gradients and can be replaced by a contiguous {old.dtype} {list(old.shape)} on "
            f"{old.device} only, got {new.dtype} {list(new.shape)} on {new.device}, strides {new.stride()}; {remedy}"
        )
    address = new.untyped_storage().data_ptr()
    for other, parameter in model.named_parameters():
        if parameter is not old and address and parameter.untyped_storage().data_ptr() == address:
            raise RuntimeError(
                f"{name} trains in compact_gradients and its replacement shares memory with {other}; {remedy}"
            )


class _Copier:
    """Deep copies a model as it was before: without leaves, nothing frozen but what is selected and was frozen since.

    A model has it as its `__deepcopy__`, which is where `copy.deepcopy` looks.
    """

    def __init__(self, model: nn.Module, owner: nn.Module, required: dict[str, bool]) -> None:
        self._model, self._owner, self._required = model, owner, required

    def __call__(self, memo: dict[int, Any]) -> nn.Module:
        model, owner, leaves = self._model, self._owner, _leaves(self._owner)
        try:
            del model.__deepcopy__
            for name in leaves:
                del owner._parameters[name]
            copied = copy.deepcopy(model, memo)
        finally:
            model.__deepcopy__ = self  # type: ignore[assignment, operator, unused-ignore]
            owner._parameters.update(leaves)
        for name, parameter in copied.named_parameters():
            parameter.requires_grad_(self._required.get(name, parameter.requires_grad))
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError(
            "a model whose gradients are compact cannot be pickled; save its state_dict(), a copy.deepcopy of it, or "
            "leave compact_gradients first"
        )
