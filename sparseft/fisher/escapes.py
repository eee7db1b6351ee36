"""Tensors of a transform that code keeps: they mean nothing after it, and are an error in the next forward pass."""

from __future__ import annotations

import gc
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import CellType
from typing import Any

from torch import Tensor, nn
from torch._C import _functorch as functorch

from sparseft.fisher.nest import tensors


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Put attributes and buffers of modules back that are tensors of a transform when it is over."""
    before = [(held, dict(held)) for module in model.modules() for held in (vars(module), module._buffers)]
    try:
        yield
    finally:
        for held, values in before:
            changed = [name for name, value in held.items() if value is not values.get(name, held)]
            for name in changed:
                if not any(map(functorch.is_functorch_wrapped_tensor, tensors(held[name]))):
                    continue
                if name in values:
                    held[name] = values[name]
                else:
                    del held[name]


def released(made: Iterable[weakref.ref[Tensor]]) -> bool:
    """Return whether nobody kept a tensor of a transform that is over.

    Where one is kept, what the model would have kept after running the first sample alone takes its place: in dicts,
    lists, deques, closures and attributes, wherever they are.
    """
    for youngest in (0, 1, 2):
        alive = [tensor for tensor in (ref() for ref in made) if tensor is not None]
        if not alive:
            return True
        if youngest < 2:
            del alive
            gc.collect(1 + youngest)  # of cycles, which hold nothing for long
    for tensor in alive:
        plain = _of_first(tensor)
        for holder in gc.get_referrers(tensor):
            if holder is not alive:
                with suppress(Exception):  # what cannot be changed keeps what it has
                    _replace(holder, tensor, plain)
    return False


def _of_first(tensor: Tensor) -> Tensor:
    """Return what a tensor has for the first sample."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        axis = functorch.maybe_get_bdim(tensor) if functorch.is_batchedtensor(tensor) else -1
        tensor = functorch.get_unwrapped(tensor)
        if axis >= 0:
            tensor = tensor.select(axis, 0)
    return tensor.detach()


def _replace(holder: Any, old: Tensor, new: Tensor) -> None:
    if isinstance(holder, dict):
        for key in [key for key, value in holder.items() if value is old]:
            dict.__setitem__(holder, key, new)
    elif isinstance(holder, (list, deque)):
        for place in [place for place, value in enumerate(holder) if value is old]:
            holder[place] = new
    elif isinstance(holder, CellType):
        holder.cell_contents = new
    elif isinstance(holder, tuple):
        # a nest of what is kept; it cannot be changed, but what holds it can
        changed = type(holder)(*_with(holder, old, new)) if hasattr(holder, "_fields") else _with(holder, old, new)
        for above in gc.get_referrers(holder):
            if isinstance(above, (dict, list, deque)):
                _replace(above, holder, changed)  # type: ignore[arg-type]
    else:
        slots = [slot for kind in type(holder).__mro__ for slot in getattr(kind, "__slots__", ())]
        for name in [*getattr(holder, "__dict__", ()), *slots]:
            if getattr(holder, name, None) is old:
                setattr(holder, name, new)


def _with(items: tuple[Any, ...], old: Tensor, new: Tensor) -> tuple[Any, ...]:
    return tuple(new if item is old else item for item in items)
