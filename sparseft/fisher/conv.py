"""Convolutions of one, two and three axes, transposed ones too, with any stride, padding, dilation and groups."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseft.fisher.elementwise import per_sample
from sparseft.fisher.patches import Patches, Window
from sparseft.products import autocast_dtype

if TYPE_CHECKING:
    from sparseft.fisher.capture import Capture, Use

_Size = int | Sequence[int]


@dataclass(frozen=True)
class _Kind:
    """Which convolution: its window, and for a transposed one what it adds to the size of its output."""

    window: Window
    transposed: bool
    output_padding: tuple[int, ...]

    def arguments(self) -> tuple[Any, ...]:
        """Return the last arguments of torch.convolution."""
        window = self.window
        return (window.stride, window.padding, window.dilation, self.transposed, self.output_padding, window.groups)


class _Convolution(torch.autograd.Function):
    """y = convolution of x, whose backward computes no gradient of a captured weight."""

    @staticmethod
    def forward(
        ctx: Any,
        capture: Capture,
        anchor: Tensor,
        uses: tuple[Use | None, Use | None],
        kind: _Kind,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.capture, ctx.uses, ctx.kind = capture, uses, kind
        return torch.convolution(x, weight, bias, *kind.arguments())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        capture: Capture = ctx.capture
        weight_use, bias_use = ctx.uses
        kind: _Kind = ctx.kind
        kernel = tuple(weight.shape[2:])
        if weight_use is not None:
            left, image = (x, dy) if kind.transposed else (dy, x)
            capture.emit(weight_use, Patches(capture.samples, left, image, kernel, kind.window))
        if bias_use is not None:
            capture.emit(bias_use, per_sample(capture, dy, (dy.shape[1], *[1] * len(kernel))))
        dx = None
        if ctx.needs_input_grad[4]:
            wanted = [True, False, False]
            dx = torch.ops.aten.convolution_backward(dy, x, weight, None, *kind.arguments(), wanted)[0]
        return None, None, None, None, dx, None, None


def _capture_convolution(
    capture: Capture, kind: _Kind, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor | None:
    uses = (
        capture.claim(weight, x.shape, "conv", same_shape=True),
        capture.claim(bias, x.shape, "bias", same_shape=True),
    )
    if uses == (None, None):
        return None
    dtype = autocast_dtype(x)
    x, weight = x.to(dtype), capture.sealed(weight, uses[0]).to(dtype)
    bias = None if bias is None else capture.sealed(bias, uses[1]).to(dtype)
    return capture.run(_Convolution, uses, kind, x, weight, bias)


def _convolution(
    axes: int,
    capture: Capture,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Size = 1,
    padding: _Size | str = 0,
    dilation: _Size = 1,
    groups: int = 1,
) -> Tensor | None:
    if input.dim() != axes + 2 or weight.dim() != axes + 2:
        return None
    steps, spread = _numbers(stride, axes), _numbers(dilation, axes)
    if not isinstance(padding, str):
        around = _numbers(padding, axes)
    elif padding == "valid":
        around = (0,) * axes
    elif padding == "same" and set(steps) == {1}:
        missing = [step * (size - 1) for step, size in zip(spread, weight.shape[2:], strict=True)]
        around = tuple(size // 2 for size in missing)
        if any(size % 2 for size in missing):
            input = F.pad(input, [end for size in reversed(missing) for end in (0, size % 2)])
    else:
        return None
    kind = _Kind(Window(steps, around, spread, groups), False, (0,) * axes)
    return _capture_convolution(capture, kind, input, weight, bias)


def _transposed(
    axes: int,
    capture: Capture,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Size = 1,
    padding: _Size = 0,
    output_padding: _Size = 0,
    groups: int = 1,
    dilation: _Size = 1,
) -> Tensor | None:
    if input.dim() != axes + 2 or weight.dim() != axes + 2:
        return None
    steps, extra = _numbers(stride, axes), _numbers(output_padding, axes)
    if any(more >= step for more, step in zip(extra, steps, strict=True)):
        # a convolution of the output would have more positions than the input
        return None
    window = Window(steps, _numbers(padding, axes), _numbers(dilation, axes), groups)
    return _capture_convolution(capture, _Kind(window, True, extra), input, weight, bias)


def _numbers(value: _Size, axes: int) -> tuple[int, ...]:
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * axes if len(numbers) == 1 else numbers


RULES: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.conv1d: functools.partial(_convolution, 1),
    F.conv2d: functools.partial(_convolution, 2),
    F.conv3d: functools.partial(_convolution, 3),
    F.conv_transpose1d: functools.partial(_transposed, 1),
    F.conv_transpose2d: functools.partial(_transposed, 2),
    F.conv_transpose3d: functools.partial(_transposed, 3),
}
