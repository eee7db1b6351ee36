"""AdamW on the selected entries of all parameters, in one launch for all of one kind of dtypes."""

from __future__ import annotations

import math
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
def _one_minus_exp(x):
    """Return 1 - exp(x) for x <= 0, to fp32 accuracy also near 0, where the difference cancels.

    1 - beta2**step is 0.001 at step 1: from a rounded power it would keep four digits.
    """
    # Taylor's series in Horner's form; from -0.5 on, the first term left out is below 2e-8 of the sum
    small = tl.maximum(x, -0.5)
    series = 1.0 + small / 9.0
    for n in tl.static_range(8, 1, -1):
        series = 1.0 + small / n * series
    return tl.where(x < -0.5, 1.0 - tl.exp(x), -small * series)


@triton.jit
def _adamw_kernel(
    table,
    lr,
    lr_tensor,
    grad_scale,
    found_inf,
    weight_decay,
    one_minus_beta1,
    log_beta1,
    beta2,
    one_minus_beta2,
    log_beta2,
    eps,
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
    """States: exp_avg, exp_avg_sq."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    row, element, exists = find_chunk(table, CHUNK)
    index, grad, weight = load_selected(
        row, element, exists, grad_scale, PARAM, GRAD, INDEX, COMPACT, HAS_MASTER, MAXIMIZE
    )
    exp_avg = load_state(row, element, exists, 0, LOW_BITS)
    exp_avg_sq = load_state(row, element, exists, 1, LOW_BITS)
    exp_avg += (grad - exp_avg) * one_minus_beta1
    exp_avg_sq = exp_avg_sq * beta2 + grad * grad * one_minus_beta2
    store_state(row, element, index, exists, exp_avg, 0, LOW_BITS, CHUNK)
    store_state(row, element, index, exists, exp_avg_sq, 1, LOW_BITS, CHUNK)
    step = tl.load(pointer(row, 6, tl.float32))
    correction1, correction2 = _one_minus_exp(step * log_beta1), _one_minus_exp(step * log_beta2)
    denominator = tl.sqrt_rn(exp_avg_sq) * tl.div_rn(1.0, tl.sqrt_rn(correction2)) + eps
    lr = learning_rate(lr, lr_tensor)
    weight -= lr * weight_decay * decayed_part(row, element, exists, weight, PARAM, HAS_PRETRAINED)
    weight -= tl.div_rn(lr, correction1) * tl.div_rn(exp_avg, denominator)
    store_weight(row, element, index, exists, weight, PARAM, HAS_MASTER, STOCHASTIC)


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    indices: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    steps: list[Tensor],
    *,
    beta1: float,
    beta2: float,
    eps: float,
    **options: Any,
) -> None:
    """One AdamW step on the selected entries of every parameter, as `reference_optim.adamw_` says."""
    states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    numbers = (1 - beta1, _log(beta1), beta2, 1 - beta2, _log(beta2), eps)
    launch_step(_adamw_kernel, params, grads, indices, states, masters, steps, StepOptions(**options), *numbers)


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf
