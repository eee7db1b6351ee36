"""Operations in which a tensor that all samples share can meet the batch: it is broadcast, expanded or repeated.

Each would give the same result on a tensor that held a copy for each sample already, and makes something at least as
large as those copies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Func = Callable[..., Any]
_TENSOR = torch.Tensor


def _variants(*names: str) -> set[Func]:
    """Return the functions and methods of these names, in place and as operators."""
    spelled = [f"{name}{end}" for name in names for end in ("", "_")]
    operators = [f"__{kind}{name}__" for name in ("add", "sub", "mul", "truediv") for kind in ("", "r", "i")]
    return {
        getattr(holder, name)
        for holder, found in ((torch, spelled), (_TENSOR, [*spelled, *operators]))
        for name in found
        if hasattr(holder, name)
    }


_ELEMENTWISE = _variants("add", "sub", "mul", "div", "where", "maximum", "minimum", "pow", "expand_as")
_PRODUCTS: set[Func] = {torch.matmul, _TENSOR.matmul, _TENSOR.__matmul__}
_EXPANSIONS: set[Func] = {_TENSOR.expand, torch.broadcast_to, _TENSOR.broadcast_to}
_FUNCTIONS = {*_ELEMENTWISE, *_PRODUCTS, *_EXPANSIONS, _TENSOR.repeat, F.scaled_dot_product_attention}


@dataclass(frozen=True)
class Meeting:
    """What an operation makes of tensors that all samples share.

    shape: what they are broadcast to, of a repetition how often; only the first two sizes matter.
    dtype: of a result on which a tensor without dimensions has no say.
    """

    func: Func
    shape: tuple[int, ...]
    dtype: torch.dtype | None

    def sizes(self, tensor: Tensor) -> tuple[int, int]:
        """Return how many copies are made of the tensor along the first two axes, 0 for none."""
        aligned = self._aligned(tensor.shape)
        repeats = self.func is _TENSOR.repeat
        counts = [size if repeats or own == 1 else 0 for size, own in zip(self.shape, aligned, strict=True)]
        return counts[0], counts[1] if len(counts) > 1 else 0

    def spread(self, copies: Tensor, axis: int) -> Tensor:
        """Return copies of a tensor, [copies, *shape], as one that holds them along an axis of the result."""
        aligned = copies.reshape(copies.shape[0], *self._aligned(copies.shape[1:]))
        if copies.dim() == 1 and self.dtype is not None:
            aligned = aligned.to(self.dtype)
        return aligned.movedim(0, axis).flatten(axis, axis + 1)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], axis: int) -> Any:
        """Run the operation on tensors that hold copies along an axis."""
        if self.func is _TENSOR.repeat:
            rest = [1 if i == axis else count for i, count in enumerate(self.shape)]
            return args[0].repeat(rest)
        return self.func(*args, **kwargs)

    def _aligned(self, shape: torch.Size) -> tuple[int, ...]:
        return (1,) * (len(self.shape) - len(shape)) + tuple(shape)


def meeting(func: Func, args: tuple[Any, ...], kwargs: dict[str, Any], shared: list[Tensor]) -> Meeting | None:
    """Return what the operation makes of these shared tensors, None if they cannot meet the batch in it."""
    if func not in _FUNCTIONS:
        return None
    if changes(func) and args and any(args[0] is tensor for tensor in shared):
        return None
    operands = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
    shape = _shape(func, args, kwargs, [operand.shape for operand in operands])
    if not shape or any(tensor.dim() > len(shape) for tensor in shared):
        return None
    dtypes = [operand.dtype for operand in operands if operand.dim() and operand.is_floating_point()]
    return Meeting(func, shape, functools.reduce(torch.promote_types, dtypes) if dtypes else None)


@functools.lru_cache(1024)
def changes(func: Func) -> bool:
    """Return whether a function of this name changes its first argument in place."""
    name = getattr(func, "__name__", "")
    special = name.startswith("__") and name.endswith("__")
    return name == "__setitem__" or (name.startswith("__i") if special else name.endswith("_"))


def _shape(
    func: Func, args: tuple[Any, ...], kwargs: dict[str, Any], operands: list[torch.Size]
) -> tuple[int, ...] | None:
    if func in _EXPANSIONS or func is _TENSOR.repeat:
        if kwargs:
            return None
        sizes = args[1:] if len(args) != 2 or isinstance(args[1], int) else tuple(args[1])
        own = (1,) * (len(sizes) - args[0].dim()) + tuple(args[0].shape)
        return tuple(mine if size == -1 else size for size, mine in zip(sizes, own, strict=True))
    try:
        if func in _ELEMENTWISE:
            return tuple(torch.broadcast_shapes(*operands))
        # of queries, keys, values and a mask, only the axes of the batch are broadcast; copies of a matrix would be
        # larger than the product
        leading = torch.broadcast_shapes(*(operand[:-2] for operand in operands))
        return (*leading, 0, 0) if all(len(operand) > 2 for operand in operands) else None
    except RuntimeError:  # grouped heads
        return None
