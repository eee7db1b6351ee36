"""A group's parameters, their gradients and their index lists."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparseft.mask import check_indices
from sparseft.reference import index_dtype

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def values(param: Tensor, index: Tensor) -> Tensor:
    """Return the selected entries of a parameter, in its dtype: [k]."""
    return param.detach().view(-1)[index.long()]


@dataclasses.dataclass
class Trained:
    """The parameters of a group that have a gradient, the gradients, index lists, and places in the group."""

    params: list[Tensor] = dataclasses.field(default_factory=list)
    grads: list[Tensor] = dataclasses.field(default_factory=list)
    indices: list[Tensor] = dataclasses.field(default_factory=list)
    places: list[int] = dataclasses.field(default_factory=list)


def trained(group: Mapping[str, Any]) -> Trained:
    """Return what a step works on; warn of selected entries that are frozen."""
    found = Trained()
    for place, (param, index) in enumerate(zip(group["params"], group["indices"], strict=True)):
        grad = param.grad
        if grad is not None:
            found.params.append(param)
            found.grads.append(grad)
            found.indices.append(index)
            found.places.append(place)
        elif index.numel() and not param.requires_grad:
            warnings.warn(
                f"a parameter of shape {list(param.shape)} with {index.numel()} selected entries is frozen "
                "(requires_grad=False) and does not train; unfreeze it, or select again without it",
                stacklevel=4,
            )
    return found


def checked_indices(params: list[Tensor], indices: Sequence[Tensor | None] | None) -> list[Tensor]:
    """Return one index list a parameter, on its device, in its dtype; all entries where there is no list."""
    for param in params:
        if param.dtype not in _FLOATS or not param.is_contiguous():
            raise TypeError(
                f"parameters must be contiguous and fp32, bf16 or fp16, got {param.dtype} {param.stride()}"
            )
    if indices is None:
        indices = [None] * len(params)
    if len(indices) != len(params):
        raise ValueError(f"a group needs one index list a parameter, got {len(indices)} for {len(params)} parameters")
    return [
        torch.arange(param.numel(), dtype=index_dtype(param.numel()), device=param.device)
        if index is None
        else check_indices(f"parameter {i} of the group", index, param.numel()).to(param.device)
        for i, (param, index) in enumerate(zip(params, indices, strict=True))
    ]
