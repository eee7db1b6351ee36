"""Linear layers: the weight gradient at the selected entries alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparseft import ops  # noqa: F401  (registers torch.ops.sparseft)
from sparseft.compact import bands
from sparseft.compact.selection import Selection
from sparseft.entries import entries_of
from sparseft.products import autocast_dtype, input_gradient, linear


class _Linear(torch.autograd.Function):
    """y = x @ weight.T + bias, or x @ weight + bias for a weight [I, O]; the leaf gets the weight's gradient.

    spans, where, kept: see `Wanted`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        entries: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transposed: bool,
        spans: tuple[tuple[int, int], ...] | None,
        where: Tensor,
        kept: Tensor | None,
    ) -> Tensor:
        needed = x if kept is None else x.index_select(-1, kept)
        ctx.save_for_backward(needed if ctx.needs_input_grad[0] else None, weight, where)
        ctx.transposed, ctx.dtype, ctx.spans, ctx.leaf = transposed, x.dtype, spans, (entries.shape, entries.dtype)
        matrix = weight.to(x.dtype)
        return linear(x, matrix.T if transposed else matrix, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, where = ctx.saved_tensors
        grad = dx = bias_grad = None
        if ctx.needs_input_grad[1]:
            matrix = weight.to(ctx.dtype)
            dx = input_gradient(dy, matrix.T if ctx.transposed else matrix)
        dy_rows = dy.reshape(math.prod(dy.shape[:-1]), dy.shape[-1])
        if x is not None:
            x_rows = x.reshape(len(dy_rows), x.shape[-1])
            shape, dtype = ctx.leaf
            left, right = (x_rows, dy_rows) if ctx.transposed else (dy_rows, x_rows)
            if ctx.spans is None:
                grad = torch.zeros(shape, dtype=torch.float32, device=dy.device)
                torch.ops.sparseft.selected_grad_(grad, right, left, where)
            else:
                grad = bands.gradient(left, right, bands.Bands(ctx.spans, where))
            grad = grad.to(dtype)
        if ctx.needs_input_grad[3]:
            bias_grad = dy_rows.sum(0)
        return grad, dx, None, bias_grad, None, None, None, None


def _compact_linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor | None:
    selection: Selection | None = getattr(weight, "selection", None)
    wanted = None if selection is None else selection.conv1d if transposed else selection.linear
    if wanted is None or entries_of(x) is not None or x.layout is not torch.strided or x.is_nested:
        return None
    if bias is not None and bias.dim() != 1:
        return None
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return None
    if bias is not None and entries_of(bias) is not None:
        bias = bias.selection.tied(bias)  # type: ignore[attr-defined]
    dtype = autocast_dtype(x)
    x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    y: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
        entries_of(weight), x, weight, bias, transposed, wanted.spans, wanted.where, wanted.kept
    )
    return y


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    return _compact_linear(input, weight, bias, transposed=False)


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, **scales: Any) -> Tensor | None:
    """torch.addmm as transformers' Conv1D calls it."""
    if scales or input.dim() != 1 or entries_of(mat1) is not None:
        return None
    return _compact_linear(mat1, mat2, input, transposed=True)


def _matmul(input: Tensor, other: Tensor, **options: Any) -> Tensor | None:
    if options or entries_of(other) is None:
        return None
    return _compact_linear(input, other, None, transposed=True)


RULES: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _matmul),
}
