"""Small parameters used elementwise: `weight * x`, `x + bias`, `(1 + weight) * x`, `cls_token.expand(N, ...)`.

The per-sample gradient of such a parameter is small, so it is formed: [N, numel].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparseft.fisher.contribution import Vector

if TYPE_CHECKING:
    from sparseft.fisher.capture import Capture, Use


def per_sample(capture: Capture, grad: Tensor, shape: tuple[int, ...], use: Use | None = None) -> Vector:
    """Sum a gradient at a result over what a parameter of this shape was broadcast along, per sample."""
    rows = capture.split(grad, use)  # [N, r, ...]
    aligned = (1,) * (rows.dim() - len(shape)) + shape
    summed = [axis for axis in range(1, rows.dim()) if aligned[axis] == 1]
    return Vector(rows.sum(summed, dtype=torch.float32).reshape(len(rows), -1))


class _Product(torch.autograd.Function):
    """y = x * param."""

    @staticmethod
    def forward(ctx: Any, capture: Capture, anchor: Tensor, use: Use, x: Tensor, param: Tensor) -> Tensor:
        ctx.save_for_backward(x, param)
        ctx.capture, ctx.use = capture, use
        return x * param

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, None, Tensor | None, None]:
        x, param = ctx.saved_tensors
        ctx.capture.emit(ctx.use, per_sample(ctx.capture, dy * x, tuple(param.shape), ctx.use))
        dx = (dy * param).sum_to_size(x.shape).to(x.dtype) if ctx.needs_input_grad[3] else None
        return None, None, None, dx, None


class _Sum(torch.autograd.Function):
    """y = x + sign * param."""

    @staticmethod
    def forward(ctx: Any, capture: Capture, anchor: Tensor, use: Use, sign: int, x: Tensor, param: Tensor) -> Tensor:
        ctx.capture, ctx.use, ctx.sign = capture, use, sign
        ctx.x_like, ctx.shape = (x.shape, x.dtype), tuple(param.shape)
        return torch.add(x, param, alpha=sign)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, None, None, Tensor | None, None]:
        vector = per_sample(ctx.capture, dy, ctx.shape, ctx.use)
        ctx.capture.emit(ctx.use, Vector(vector.grad * ctx.sign))
        shape, dtype = ctx.x_like
        dx = dy.sum_to_size(shape).to(dtype) if ctx.needs_input_grad[4] else None
        return None, None, None, None, dx, None


class _Repeat(torch.autograd.Function):
    """y = param, repeated for every sample."""

    @staticmethod
    def forward(ctx: Any, capture: Capture, anchor: Tensor, use: Use, sizes: tuple[int, ...], param: Tensor) -> Tensor:
        ctx.capture, ctx.use, ctx.shape = capture, use, tuple(param.shape)
        return param.expand(sizes).clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, ...]:
        ctx.capture.emit(ctx.use, per_sample(ctx.capture, dy, ctx.shape, ctx.use))
        return (None,) * 5


def scale(capture: Capture, use: Use, x: Tensor, param: Tensor) -> Tensor:
    """Return x * param, captured as the given use."""
    return capture.run(_Product, use, x, capture.sealed(param, use))


def _operands(capture: Capture, a: Any, b: Any) -> tuple[Tensor, Tensor, Use, bool] | None:
    """Return (x, parameter, its use, whether the parameter came first), if exactly one operand is a parameter."""
    first = capture.knows(a)
    if first == capture.knows(b):
        return None
    param, x = (a, b) if first else (b, a)
    if not isinstance(x, Tensor) or x.dim() == 0:
        return None
    result = torch.broadcast_shapes(x.shape, param.shape)
    if len(param.shape) == len(result) and param.shape[0] != 1:
        return None
    use = capture.claim(param, result, "elementwise", anywhere=True)
    return None if use is None else (x, param, use, first)


def _mul(capture: Capture, a: Any = None, b: Any = None, **options: Any) -> Tensor | None:
    found = None if options else _operands(capture, a, b)
    if found is None:
        return None
    x, param, use, _ = found
    return scale(capture, use, x, param)


def _add(capture: Capture, a: Any = None, b: Any = None, **options: Any) -> Tensor | None:
    return None if options else _sum(capture, a, b, torch.add, 1)


def _sub(capture: Capture, a: Any = None, b: Any = None, **options: Any) -> Tensor | None:
    return None if options else _sum(capture, a, b, torch.sub, -1)


def _sum(capture: Capture, a: Any, b: Any, function: Callable[..., Tensor], sign: int) -> Tensor | None:
    if capture.knows(a) and (not isinstance(b, Tensor) or (b.dim() == 0 and not b.requires_grad)):
        return capture.alias(a, function(a, b))
    found = _operands(capture, a, b)
    if found is None or (sign < 0 and found[3]):
        return None
    x, param, use, _ = found
    return capture.run(_Sum, use, sign, x, capture.sealed(param, use))


def _expand(capture: Capture, param: Tensor, *sizes: Any, **options: Any) -> Tensor | None:
    if options or not capture.knows(param):
        return None
    result = torch.Size(sizes[0] if isinstance(sizes[0], (tuple, list)) else sizes)
    kept = len(result) - param.dim()
    result = torch.Size(param.shape[i - kept] if size == -1 else size for i, size in enumerate(result))
    if len(result) == param.dim() and param.shape[0] != 1:
        return None
    use = capture.claim(param, result, "elementwise", anywhere=True)
    if use is None:
        return None
    capture.repeated = True
    return capture.run(_Repeat, use, tuple(result), capture.sealed(param, use))


def _same(name: str) -> Callable[..., Tensor | None]:
    """Return the rule of a method whose result holds the parameter's own entries, in their order."""

    def follow(capture: Capture, tensor: Any, *args: Any, **kwargs: Any) -> Tensor | None:
        if not capture.knows(tensor):
            return None
        return capture.alias(tensor, getattr(tensor, name)(*args, **kwargs))

    return follow


def _type(capture: Capture, tensor: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    # without a type to change to, it returns the name of the one there is
    return _same("type")(capture, tensor, *args, **kwargs) if args or kwargs else None


_TENSOR = torch.Tensor
RULES: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    **dict.fromkeys((torch.mul, _TENSOR.mul, _TENSOR.__mul__, _TENSOR.__rmul__), _mul),
    **dict.fromkeys((torch.add, _TENSOR.add, _TENSOR.__add__, _TENSOR.__radd__), _add),
    **dict.fromkeys((torch.sub, _TENSOR.sub, _TENSOR.__sub__), _sub),
    _TENSOR.expand: _expand,
    _TENSOR.type: _type,
    **{
        getattr(_TENSOR, name): _same(name)
        for name in ("float", "to", "type_as", "view", "reshape", "squeeze", "unsqueeze")
    },
}
