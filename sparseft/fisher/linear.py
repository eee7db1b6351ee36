"""Linear layers: F.linear, products x @ weight, and torch.addmm as transformers' Conv1D calls it (weight [I, O])."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseft.fisher.contribution import Outer, Vector
from sparseft.products import autocast_dtype, input_gradient, linear

if TYPE_CHECKING:
    from sparseft.fisher.capture import Capture, Use


class _Linear(torch.autograd.Function):
    """y = x @ weight.T + bias, whose backward computes no dense weight gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        capture: Capture,
        anchor: Tensor,
        uses: tuple[Use | None, Use | None],
        conv1d: bool,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.capture, ctx.uses, ctx.conv1d = capture, uses, conv1d
        return linear(x, weight.T if conv1d else weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        capture: Capture = ctx.capture
        weight_use, bias_use = ctx.uses
        if weight_use is not None:
            x_rows, dy_rows = capture.by_sample(x, weight_use), capture.by_sample(dy, weight_use)
            capture.emit(weight_use, Outer(x_rows, dy_rows) if ctx.conv1d else Outer(dy_rows, x_rows))
        if bias_use is not None:
            capture.emit(bias_use, Vector(capture.by_sample(dy, bias_use).sum(1, dtype=torch.float32)))
        dx = None
        if ctx.needs_input_grad[4]:
            dx = input_gradient(dy, weight.T if ctx.conv1d else weight)
        return None, None, None, None, dx, None, None


def _capture_linear(capture: Capture, x: Tensor, weight: Tensor, bias: Tensor | None, conv1d: bool) -> Tensor | None:
    if x.dim() < 2 or weight.dim() != 2 or capture.computed(weight, bias):
        return None
    uses = (
        capture.claim(weight, x.shape, "linear", same_shape=True, anywhere=True),
        capture.claim(bias, x.shape, "bias", same_shape=True, anywhere=True),
    )
    if uses == (None, None):
        return None
    dtype = autocast_dtype(x)
    x, weight = x.to(dtype), capture.sealed(weight, uses[0]).to(dtype)
    bias = None if bias is None else capture.sealed(bias, uses[1]).to(dtype)
    return capture.run(_Linear, uses, conv1d, x, weight, bias)


def _linear(capture: Capture, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    return _capture_linear(capture, input, weight, bias, conv1d=False)


def _addmm(capture: Capture, input: Tensor, mat1: Tensor, mat2: Tensor, **scales: Any) -> Tensor | None:
    if scales or input.dim() != 1:
        return None
    return _capture_linear(capture, mat1, mat2, input, conv1d=True)


def _matmul(capture: Capture, input: Tensor, other: Tensor | None = None, **options: Any) -> Tensor | None:
    if other is None or options or not capture.knows(other):
        return None
    return _capture_linear(capture, input, other, None, conv1d=True)


_TENSOR = torch.Tensor
RULES: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    **dict.fromkeys((torch.matmul, _TENSOR.matmul, _TENSOR.__matmul__), _matmul),
}
