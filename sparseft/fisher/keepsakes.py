"""What code keeps from one forward pass to the next, put back: a tensor of a transform means nothing after it."""

from __future__ import annotations

import functools
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from operator import is_not
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_LONGEST = 10_000  # entries of what is looked into: a data set, a vocabulary are none of a forward pass
# most of what a model holds: told by its type alone, since a walk is taken for every few samples
_PLAIN = {str, bytes, int, float, bool, complex, type(None), type, BuiltinFunctionType, ModuleType}
_PLAIN |= {Tensor, nn.Parameter, nn.Buffer, torch.dtype, torch.device, torch.Size}


@contextmanager
def kept(*roots: Any) -> Iterator[None]:
    """Put back what objects hold, on any way out: attributes, dicts, lists, deques, sets, what functions close over.

    Those below the roots are reached; containers of more than 10,000 entries are left alone.
    """
    before = [(holder, _contents(holder)) for holder in _holders(roots)]
    try:
        yield
    finally:
        for holder, contents in before:
            _put_back(holder, contents)


def _holders(roots: tuple[Any, ...]) -> list[Any]:
    """Return what can be changed below some objects."""
    found: list[Any] = []
    stack, seen = list(roots), set()
    while stack:
        each = stack.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        below: list[Any] = []
        kind = type(each)
        if kind is dict or kind is OrderedDict or isinstance(each, (dict, list, tuple, set, deque)):
            if len(each) <= _LONGEST:
                if not isinstance(each, tuple):
                    found.append(each)
                below = list(each.values() if isinstance(each, dict) else each)
        elif kind is CellType:
            found.append(each)
            below = _contents(each)
        elif kind is FunctionType:
            below = list(each.__closure__ or ())
        elif kind is MethodType:
            below = [each.__self__, each.__func__]
        elif kind is functools.partial:
            below = [each.func, each.args, each.keywords]
        below += _attributes(each)
        stack += [value for value in below if type(value) not in _PLAIN]
    return found


def _attributes(each: Any) -> list[Any]:
    if isinstance(each, (Tensor, type, ModuleType)):
        return []
    try:
        return [vars(each)]
    except (TypeError, ReferenceError):  # it has none, or is no more
        return []


def _contents(holder: Any) -> Any:
    if isinstance(holder, dict):
        return dict(holder)
    if not isinstance(holder, CellType):
        return list(holder)
    try:
        return [holder.cell_contents]
    except ValueError:  # nothing is in it yet
        return []


def _put_back(holder: Any, contents: Any) -> None:
    if isinstance(holder, dict):
        if len(holder) != len(contents) or any(holder.get(key, holder) is not contents[key] for key in contents):
            holder.clear()
            holder.update(contents)
    elif isinstance(holder, CellType):
        if contents:
            holder.cell_contents = contents[0]
    elif len(holder) != len(contents) or any(map(is_not, holder, contents)):
        holder.clear()
        (holder.update if isinstance(holder, set) else holder.extend)(contents)
