"""Multi-head attention: a function written in Python, whose operations are captured one by one.

It hands itself to whoever overrides functions, whole, and calls no module's forward: neither a hook nor a mode sees
the projections in it. So a copy of the function is run that believes nobody overrides anything. Inside, its packed
projection is one weight, used whole or in rows.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseft.fisher.layout import Rows

if TYPE_CHECKING:
    from sparseft.fisher.capture import Capture


COMPOSITES: set[Callable[..., Any]] = {F.multi_head_attention_forward}


def body(function: Any) -> Callable[..., Any]:
    """Return a composite without the hand-over at its beginning."""
    names = {**function.__globals__, "has_torch_function": lambda tensors: False}
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _parts(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...] | None]:
    """Return the rule of a function that cuts a parameter into blocks of rows."""

    def follow(capture: Capture, tensor: Any = None, *args: Any, **kwargs: Any) -> tuple[Tensor, ...] | None:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        if not capture.whole(tensor) or tensor.dim() == 0 or dim % tensor.dim():
            return None
        parts: tuple[Tensor, ...] = function(tensor, *args, **kwargs)
        start, width = 0, tensor[0].numel()
        for part in parts:
            capture.alias(tensor, part, Rows(start, start + len(part), width))
            start += len(part)
        return parts

    return follow


RULES: dict[Callable[..., Any], Callable[..., tuple[Tensor, ...] | None]] = {
    function: _parts(function) for function in (torch.split, torch.Tensor.split, torch.chunk, torch.Tensor.chunk)
}
