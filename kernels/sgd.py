"""SGD on the selected entries of all parameters, in one launch for all of one kind of dtypes."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sparseft.kernels.multi_tensor import find_chunk, pointer
from sparseft.kernels.optimizer import (
    decayed_part,
    launch_step,
    learning_rate,
    load_selected,
    load_state,
    store_state,
    store_weight,
)
from sparseft.reference_optim import StepOptions


@triton.jit
def _sgd_kernel(
    table,
    lr,
    lr_tensor,
    grad_scale,
    found_inf,
    weight_decay,
    momentum,
    one_minus_dampening,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    INDEX: tl.constexpr,
    COMPACT: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    HAS_PRETRAINED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    LOW_BITS: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """State, with momentum: momentum_buffer."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    row, element, exists = find_chunk(table, CHUNK)
    index, grad, weight = load_selected(
        row, element, exists, grad_scale, PARAM, GRAD, INDEX, COMPACT, HAS_MASTER, MAXIMIZE
    )
    grad += weight_decay * decayed_part(row, element, exists, weight, PARAM, HAS_PRETRAINED)
    if HAS_MOMENTUM:
        buffer = load_state(row, element, exists, 0, LOW_BITS) * momentum + one_minus_dampening * grad
        if tl.load(pointer(row, 6, tl.float32)) == 1:
            buffer = grad
        store_state(row, element, index, exists, buffer, 0, LOW_BITS, CHUNK)
        if NESTEROV:
            grad += momentum * buffer
        else:
            grad = buffer
    weight -= learning_rate(lr, lr_tensor) * grad
    store_weight(row, element, index, exists, weight, PARAM, HAS_MASTER, STOCHASTIC)


def sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    indices: list[Tensor],
    momentum_buffers: list[Tensor],
    masters: list[Tensor],
    steps: list[Tensor],
    *,
    momentum: float,
    dampening: float,
    nesterov: bool = False,
    **options: Any,
) -> None:
    """One SGD step on the selected entries of every parameter, as `reference_optim.sgd_` says."""
    launch_step(
        _sgd_kernel,
        params,
        grads,
        indices,
        {"momentum_buffers": momentum_buffers} if momentum else {},
        masters,
        steps,
        StepOptions(**options),
        momentum,
        1 - dampening,
        HAS_MOMENTUM=bool(momentum),
        NESTEROV=nesterov,
    )
