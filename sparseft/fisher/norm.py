"""LayerNorm and RMSNorm: the weight's per-sample gradient is the sum over tokens of dy * x_hat, the bias's of dy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseft import ops
from sparseft.fisher.contribution import Vector
from sparseft.fisher.elementwise import scale
from sparseft.fisher.layout import Layout

if TYPE_CHECKING:
    from sparseft.fisher.capture import Capture, Use


class _LayerNorm(torch.autograd.Function):
    """y = x_hat * weight + bias. x_hat is made again from x: (y - bias) / weight would fail at weight 0."""

    @staticmethod
    def forward(
        ctx: Any,
        capture: Capture,
        anchor: Tensor,
        uses: tuple[Use | None, Use | None],
        shape: list[int],
        eps: float,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.capture, ctx.uses, ctx.shape = capture, uses, shape
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        capture: Capture = ctx.capture
        weight_use, bias_use = ctx.uses
        normalized = len(ctx.shape)
        if _served(ctx, dy, x, weight):
            samples, features = capture.samples, dy.shape[-1]
            dx, of_weight, of_bias = torch.ops.sparseft.layer_norm_backward(
                *(part.reshape(samples, -1, features) for part in (dy, x)),
                *(part.reshape(samples, -1) for part in (mean, rstd)),
                weight,
            )
            for use, grad in ((weight_use, of_weight), (bias_use, of_bias)):
                if use is not None:
                    capture.emit(use, Vector(grad))
            return (None,) * 5 + (dx.view(x.shape), None, None)
        if weight_use is not None:
            product = (x - mean).mul_(rstd).mul_(dy).flatten(-normalized)
            capture.emit(weight_use, Vector(capture.by_sample(product, weight_use).sum(1, dtype=torch.float32)))
        if bias_use is not None:
            rows = capture.by_sample(dy.flatten(-normalized), bias_use)
            capture.emit(bias_use, Vector(rows.sum(1, dtype=torch.float32)))
        # a weight that is not captured, because it is computed, has its gradient passed on
        wanted = list(ctx.needs_input_grad[5:8])
        grads: tuple[Tensor | None, ...] = (None,) * 3
        if any(wanted):
            grads = torch.ops.aten.native_layer_norm_backward(dy, x, ctx.shape, mean, rstd, weight, bias, wanted)
        return (None,) * 5 + tuple(grads)


def _served(ctx: Any, dy: Tensor, x: Tensor, weight: Tensor | None) -> bool:
    """Return whether one op finds all gradients: fp32 on the CPU, samples one after the other."""
    return (
        ops.SERVED_BY["layer_norm_backward"]["cpu"] == "c++"
        and len(ctx.shape) == 1
        and all(use is None or use.layout in (Layout.BATCH, Layout.FLAT) for use in ctx.uses)
        and all(t is None or (t.device.type == "cpu" and t.dtype == torch.float32) for t in (dy, x, weight))
        and ctx.needs_input_grad[5]
        and not any(ctx.needs_input_grad[6:8])
    )


def _layer_norm(
    capture: Capture,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    if input.dim() <= len(normalized_shape) or capture.computed(weight, bias):
        return None
    uses = (
        capture.claim(weight, input.shape, "norm", same_shape=True, anywhere=True),
        capture.claim(bias, input.shape, "bias", same_shape=True, anywhere=True),
    )
    if uses == (None, None):
        return None
    weight = None if weight is None else capture.sealed(weight, uses[0])
    bias = None if bias is None else capture.sealed(bias, uses[1])
    if input.is_cuda and torch.is_autocast_enabled("cuda"):
        input = input.float()  # as autocast does there
    return capture.run(_LayerNorm, uses, list(normalized_shape), eps, input, weight, bias)


def _rms_norm(
    capture: Capture,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor | None:
    if weight is None or input.dim() <= len(normalized_shape):
        return None
    use = capture.claim(weight, input.shape, "norm", same_shape=True, anywhere=True)
    if use is None:
        return None
    x_hat = F.rms_norm(input, list(normalized_shape), None, eps)
    return scale(capture, use, x_hat, weight)


RULES: dict[Callable[..., Any], Callable[..., Tensor | None]] = {F.layer_norm: _layer_norm, F.rms_norm: _rms_norm}
