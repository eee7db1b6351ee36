"""Lion on the selected entries of all parameters, in one launch for all of one kind of dtypes."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sparseft.kernels.multi_tensor import find_chunk
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
def _lion_kernel(
    table,
    lr,
    lr_tensor,
    grad_scale,
    found_inf,
    weight_decay,
    one_minus_beta1,
    one_minus_beta2,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    INDEX: tl.constexpr,
    COMPACT: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    HAS_PRETRAINED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    LOW_BITS: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """State: exp_avg."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    row, element, exists = find_chunk(table, CHUNK)
    index, grad, weight = load_selected(
        row, element, exists, grad_scale, PARAM, GRAD, INDEX, COMPACT, HAS_MASTER, MAXIMIZE
    )
    exp_avg = load_state(row, element, exists, 0, LOW_BITS)
    mean = exp_avg + (grad - exp_avg) * one_minus_beta1
    exp_avg += (grad - exp_avg) * one_minus_beta2
    store_state(row, element, index, exists, exp_avg, 0, LOW_BITS, CHUNK)
    # a NaN stays one
    sign = tl.where(mean > 0, 1.0, tl.where(mean < 0, -1.0, mean))
    decay = weight_decay * decayed_part(row, element, exists, weight, PARAM, HAS_PRETRAINED)
    weight -= learning_rate(lr, lr_tensor) * (sign + decay)
    store_weight(row, element, index, exists, weight, PARAM, HAS_MASTER, STOCHASTIC)


def lion_(
    params: list[Tensor],
    grads: list[Tensor],
    indices: list[Tensor],
    exp_avgs: list[Tensor],
    masters: list[Tensor],
    steps: list[Tensor],
    *,
    beta1: float,
    beta2: float,
    **options: Any,
) -> None:
    """One Lion step on the selected entries of every parameter, as `reference_optim.lion_` says."""
    states, numbers = {"exp_avgs": exp_avgs}, (1 - beta1, 1 - beta2)
    launch_step(_lion_kernel, params, grads, indices, states, masters, steps, StepOptions(**options), *numbers)
