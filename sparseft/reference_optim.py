"""The optimizers' ops in plain PyTorch; part of `reference`, which says what that is for.

Every op takes `params, grads, indices`, its states, `masters` and `steps`, lists with one tensor a parameter, its own
options, and those of `StepOptions`. It updates the selected entries; nothing else is read or written.

params: contiguous fp32, bf16 or fp16; grads: dense, the parameter's shape, or compact [k], any float dtype; indices:
lists of k entries; states: fp32 [k]; masters: fp32 [k], or empty: a 16-bit weight then keeps no more digits than it
has; steps: 0-d fp32, steps before this one, which is counted first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sparseft import low_bits
from sparseft.index_lists import positions


@dataclasses.dataclass
class StepOptions:
    """What every optimizer's op takes beside its own options.

    lr: step size; lr_tensor, a 0-d tensor, is used in its place if given. weight_decay: as the op says; it pulls
    weights to zero or to `pretrained`, one tensor [k] a parameter, in its dtype.
    seeds: one a parameter, with which bf16 and fp16 weights without a master are rounded stochastically, to either
    neighbour with the probability that makes the mean right; without seeds they are rounded to the nearest.
    scales: one tensor a parameter, fp32 [number of states, ceil(k / 256)], if states are not fp32 but uint8, the codes
    that `low_bits.encode` makes. They are rounded stochastically, so seeds are needed then.
    maximize: ascend. grad_scale, found_inf: GradScaler's, one fp32 value each; gradients are divided by the first, and
    nothing changes, nor counts, when the second is not 0.
    """

    lr: float
    weight_decay: float
    maximize: bool = False
    pretrained: list[Tensor] | None = None
    seeds: list[int] | None = None
    scales: list[Tensor] | None = None
    lr_tensor: Tensor | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


@dataclasses.dataclass
class _Entries:
    """The selected entries of one parameter in fp32: an op changes `weight` and `states` in place."""

    grad: Tensor
    weight: Tensor
    states: list[Tensor]
    decay: Tensor
    lr: float
    count: float


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
    """One AdamW step; decay is decoupled: `lr * weight_decay` times the weight, or its distance from `pretrained`.

    Source: arXiv 1711.05101, in torch.optim.AdamW's order of operations.
    """
    for entries in _step(params, grads, indices, [exp_avgs, exp_avg_sqs], masters, steps, StepOptions(**options)):
        exp_avg, exp_avg_sq = entries.states
        exp_avg.lerp_(entries.grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(entries.grad, entries.grad, value=1 - beta2)
        correction1, correction2 = 1 - beta1**entries.count, 1 - beta2**entries.count
        denominator = (exp_avg_sq.sqrt() / correction2**0.5).add_(eps)
        entries.weight.sub_(entries.lr * entries.decay)
        entries.weight.addcdiv_(exp_avg, denominator, value=-entries.lr / correction1)


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
    """One Lion step: against the sign of a mean of the gradients; decay as for AdamW.

    Source: arXiv 2302.06675, algorithm 2. An entry whose mean is 0 only decays.
    """
    for entries in _step(params, grads, indices, [exp_avgs], masters, steps, StepOptions(**options)):
        (exp_avg,) = entries.states
        direction = exp_avg.lerp(entries.grad, 1 - beta1).sign_()
        exp_avg.lerp_(entries.grad, 1 - beta2)
        entries.weight.sub_(entries.lr * (direction + entries.decay))


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
    """One SGD step; decay is added to the gradient.

    momentum_buffers are empty without momentum; at step 1 the buffer becomes the gradient itself, undamped, as in
    torch.optim.SGD.
    """
    for entries in _step(params, grads, indices, [momentum_buffers], masters, steps, StepOptions(**options)):
        grad, (buffer,) = entries.grad + entries.decay, entries.states
        if momentum:
            if entries.count == 1:
                buffer.copy_(grad)
            else:
                buffer.mul_(momentum).add_(grad, alpha=1 - dampening)
            grad = grad + momentum * buffer if nesterov else buffer
        entries.weight.sub_(entries.lr * grad)


def _step(
    params: list[Tensor],
    grads: list[Tensor],
    indices: list[Tensor],
    states: list[list[Tensor]],
    masters: list[Tensor],
    steps: list[Tensor],
    options: StepOptions,
) -> Iterator[_Entries]:
    """Count the step, yield the entries of one parameter after the other, and write back what was made of them."""
    if options.scales is not None and options.seeds is None:
        raise ValueError("states in 8 bits are rounded at random, got scales and no seeds; give seeds")
    if options.found_inf is not None and options.found_inf.item():
        return
    lr = options.lr if options.lr_tensor is None else float(options.lr_tensor)
    for step in steps:
        step += 1
    for i, (param, packed) in enumerate(zip(params, indices, strict=True)):
        index = positions(packed, param.numel())
        grad = _selected_grad(grads[i], index, options)
        weight = _selected_weight(param, index, masters[i])
        decay = options.weight_decay * (weight if options.pretrained is None else weight - options.pretrained[i])
        kept = [tensors[i] for tensors in states]
        if options.scales is not None:
            kept = [low_bits.decode(codes, options.scales[i][s], s == 1) for s, codes in enumerate(kept)]
        yield _Entries(grad, weight, kept, decay, lr, float(steps[i]))
        random = None if options.seeds is None else low_bits.random_bits(options.seeds[i], float(steps[i]), index)
        if options.scales is not None and random is not None:
            for s, values in enumerate(kept):
                codes, scales = low_bits.encode(values, s == 1, low_bits.random_of_state(random, s))
                states[s][i].copy_(codes)
                options.scales[i][s] = scales
        if masters[i].numel():
            masters[i].copy_(weight)
        elif random is not None and param.dtype in (torch.bfloat16, torch.float16):
            weight = low_bits.round_stochastically(weight, param.dtype, random)
        param.view(-1)[index.long()] = weight.to(param.dtype)


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in fp32, in which arithmetic is done whatever inputs are stored in; fp64 stays, to be exact."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _selected_grad(grad: Tensor, index: Tensor, options: StepOptions) -> Tensor:
    selected = grad.reshape(-1) if grad.numel() == index.numel() else grad.reshape(-1)[index.long()]
    selected = wide(selected)
    if options.grad_scale is not None:
        selected = selected / options.grad_scale
    return -selected if options.maximize else selected


def _selected_weight(param: Tensor, index: Tensor, master: Tensor) -> Tensor:
    weight = param.view(-1)[index.long()]
    if not master.numel():
        return wide(weight)
    # a weight that was changed from outside (a delta swapped in) no longer rounds from its master: the weight wins
    return torch.where(master.to(param.dtype) == weight, master, weight.float())
