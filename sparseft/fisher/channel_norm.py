"""Norms with a weight and a bias a channel, [N, C, ...]: GroupNorm, InstanceNorm, BatchNorm in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseft.fisher.elementwise import per_sample
from sparseft.fisher.refusal import Refusal

if TYPE_CHECKING:
    from sparseft.fisher.capture import Capture, Use

_Uses = tuple["Use | None", "Use | None"]


class _GroupNorm(torch.autograd.Function):
    """y = x_hat * weight + bias, x_hat normalized over the channels of a group and all positions."""

    @staticmethod
    def forward(
        ctx: Any,
        capture: Capture,
        anchor: Tensor,
        uses: _Uses,
        groups: int,
        eps: float,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        rows, channels, positions = x.shape[0], x.shape[1], x[0, 0].numel()
        y, mean, rstd = torch.native_group_norm(x, weight, bias, rows, channels, positions, groups, eps)
        ctx.sizes = (rows, channels, positions, groups)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.capture, ctx.uses = capture, uses
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        dy = dy.contiguous()
        if ctx.uses[0] is not None:
            x_hat = (x.view(*mean.shape, -1) - mean.unsqueeze(-1)).mul_(rstd.unsqueeze(-1)).view(x.shape)
            _emit(ctx, 0, x_hat.mul_(dy))
        _emit(ctx, 1, dy)
        dx = None
        if ctx.needs_input_grad[5]:
            wanted = [True, False, False]
            dx = torch.ops.aten.native_group_norm_backward(dy, x, mean, rstd, weight, *ctx.sizes, wanted)[0]
        return None, None, None, None, None, dx, None, None


class _BatchNorm(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, mean and var constants."""

    @staticmethod
    def forward(
        ctx: Any,
        capture: Capture,
        anchor: Tensor,
        uses: _Uses,
        mean: Tensor,
        var: Tensor,
        eps: float,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var)
        ctx.capture, ctx.uses, ctx.eps = capture, uses, eps
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        channels = (-1, *[1] * (x.dim() - 2))
        rstd = (var + ctx.eps).rsqrt_()
        if ctx.uses[0] is not None:
            _emit(ctx, 0, (x - mean.view(channels)).mul_(rstd.view(channels)).mul_(dy))
        _emit(ctx, 1, dy)
        dx = None
        if ctx.needs_input_grad[6]:
            scale = rstd if weight is None else rstd * weight
            dx = (dy * scale.view(channels)).to(x.dtype)
        return None, None, None, None, None, None, dx, None, None


def _emit(ctx: Any, which: int, grad: Tensor) -> None:
    if ctx.uses[which] is not None:
        shape = (grad.shape[1], *[1] * (grad.dim() - 2))
        ctx.capture.emit(ctx.uses[which], per_sample(ctx.capture, grad, shape))


def _claim(
    capture: Capture, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[_Uses, Tensor | None, Tensor | None]:
    """Return the uses, and the weight and the bias as a captured operation may see them."""
    uses = (
        capture.claim(weight, x.shape, "norm", same_shape=True),
        capture.claim(bias, x.shape, "bias", same_shape=True),
    )
    weight = None if weight is None else capture.sealed(weight, uses[0])
    return uses, weight, None if bias is None else capture.sealed(bias, uses[1])


def _group_norm(
    capture: Capture,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    if input.dim() < 2 or input.shape[1] % num_groups:
        return None
    uses, weight, bias = _claim(capture, input, weight, bias)
    if uses == (None, None):
        return None
    if input.is_cuda and torch.is_autocast_enabled("cuda"):
        input = input.float()  # as autocast does there
    return capture.run(_GroupNorm, uses, num_groups, eps, input.contiguous(), weight, bias)


def _batch_norm(
    capture: Capture,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    if training:
        if input.numel() == input.shape[1]:
            raise Refusal(
                "batch norm must use its running statistics, got one value a channel to take statistics of: with them "
                "the loss of a sample depends on the other samples of its batch; construct it with "
                "track_running_stats=True, or use a norm without batch statistics"
            )
        return None
    if running_mean is None or running_var is None or input.dim() < 2:
        return None
    uses, weight, bias = _claim(capture, input, weight, bias)
    if uses == (None, None):
        return None
    return capture.run(_BatchNorm, uses, running_mean, running_var, eps, input, weight, bias)


def _instance_norm(
    capture: Capture,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    if not use_input_stats:
        return _batch_norm(capture, input, running_mean, running_var, weight, bias, eps=eps)
    if running_mean is not None or running_var is not None:
        return None
    return _group_norm(capture, input, input.shape[1], weight, bias, eps)


RULES: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
}
