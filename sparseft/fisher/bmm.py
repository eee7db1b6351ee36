"""torch.bmm with a stack of matrices [G, I, O], each of which meets rows of every sample: x [G, N * T, I]."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparseft.fisher.grouped import Grouped
from sparseft.products import autocast_dtype

if TYPE_CHECKING:
    from sparseft.fisher.capture import Capture, Use


class _Bmm(torch.autograd.Function):
    """y = bmm(x, weight), whose backward computes no dense weight gradient."""

    @staticmethod
    def forward(ctx: Any, capture: Capture, anchor: Tensor, use: Use, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.capture, ctx.use = capture, use
        return torch.bmm(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        capture: Capture = ctx.capture
        groups, rows, _ = x.shape
        segment = torch.arange(groups * capture.samples, device=x.device).repeat_interleave(rows // capture.samples)
        capture.emit(ctx.use, Grouped(capture.samples, x.flatten(0, 1), dy.flatten(0, 1), segment))
        dx = torch.bmm(dy, weight.mT) if ctx.needs_input_grad[3] else None
        return None, None, None, dx, None


def _bmm(capture: Capture, x: Tensor, weight: Tensor, **options: Any) -> Tensor | None:
    if options or x.dim() != 3 or weight.dim() != 3:
        return None
    # the rows of each matrix grow with the batch, not the leading dimension
    use = capture.claim(weight, (x.shape[1], len(x), weight.shape[2]), "bmm", same_shape=True)
    if use is None:
        return None
    dtype = autocast_dtype(x)
    return capture.run(_Bmm, use, x.to(dtype), capture.sealed(weight, use).to(dtype))


RULES: dict[Callable[..., Any], Callable[..., Tensor | None]] = {torch.bmm: _bmm, torch.Tensor.bmm: _bmm}
