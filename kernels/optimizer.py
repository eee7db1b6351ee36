"""What the optimizers share: gradients and weights read at the selected entries, weights written back, the launch.

Columns of their table: k, indices, their blocks, gradient, parameter, master, step, pretrained, mixed seed, scales,
then the optimizer's states. What is not needed is 0.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseft.index_lists import count
from sparseft.kernels.checks import FLOAT32, check_indices, check_lengths, check_tensor
from sparseft.kernels.low_bits import load_codes, random_bits, random_key, round_stochastically, store_codes
from sparseft.kernels.multi_tensor import FLOATS, Row, index_columns, launch, load_index, pointer
from sparseft.low_bits import code_blocks, mixed_seed
from sparseft.reference_optim import StepOptions

# what tells the tensors of one launch from those of another
_CONSTANTS = ("PARAM", "GRAD", "INDEX", "COMPACT", "HAS_MASTER")
# the first column of the states
STATES = tl.constexpr(10)
_SCALES = tl.constexpr(9)


@triton.jit
def load_selected(
    row,
    element,
    exists,
    grad_scale,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    INDEX: tl.constexpr,
    COMPACT: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    MAXIMIZE: tl.constexpr,
):
    """Return the selected positions, their gradients to descend along and their weights, both in fp32."""
    index = load_index(row, element, exists, INDEX)
    position = element if COMPACT else index
    grad = tl.load(pointer(row, 3, GRAD) + position, mask=exists, other=0.0).to(tl.float32)
    if grad_scale is not None:
        grad *= tl.div_rn(1.0, tl.load(grad_scale).to(tl.float32))
    if MAXIMIZE:
        grad = -grad
    weight = tl.load(pointer(row, 4, PARAM) + index, mask=exists, other=0.0).to(tl.float32)
    if HAS_MASTER:
        master = tl.load(pointer(row, 5, tl.float32) + element, mask=exists, other=0.0)
        # a weight that was changed from outside (a delta swapped in) no longer rounds from its master: the weight wins
        weight = tl.where(master.to(PARAM).to(tl.float32) == weight, master, weight)
    return index, grad, weight


@triton.jit
def decayed_part(row, element, exists, weight, PARAM: tl.constexpr, HAS_PRETRAINED: tl.constexpr):
    """Return what decay shrinks: weights, or their distance from the pretrained ones."""
    if HAS_PRETRAINED:
        return weight - tl.load(pointer(row, 7, PARAM) + element, mask=exists, other=0.0).to(tl.float32)
    else:
        return weight


@triton.jit
def load_state(row, element, exists, STATE: tl.constexpr, LOW_BITS: tl.constexpr):
    """Return fp32 values of a state: the first, 0, or the second, 1."""
    if LOW_BITS:
        return load_codes(row, element, exists, STATES + STATE, _SCALES, STATE)
    else:
        return tl.load(pointer(row, STATES + STATE, tl.float32) + element, mask=exists, other=0.0)


@triton.jit
def store_state(row, element, index, exists, value, STATE: tl.constexpr, LOW_BITS: tl.constexpr, CHUNK: tl.constexpr):
    """Write fp32 values of a state."""
    if LOW_BITS:
        random = _random(row, index)
        store_codes(row, element, exists, value, random, STATES + STATE, _SCALES, STATE, CHUNK)
    else:
        tl.store(pointer(row, STATES + STATE, tl.float32) + element, value, mask=exists)


@triton.jit
def _random(row, index):
    """Return the random bits of selected positions at this step."""
    return random_bits(random_key(tl.load(row + 8), tl.load(pointer(row, 6, tl.float32))), index)


@triton.jit
def store_weight(
    row, element, index, exists, weight, PARAM: tl.constexpr, HAS_MASTER: tl.constexpr, STOCHASTIC: tl.constexpr
):
    """Write fp32 weights to the selected positions and to their master copy."""
    if STOCHASTIC and PARAM != tl.float32 and not HAS_MASTER:
        rounded = round_stochastically(weight, _random(row, index), PARAM)
    else:
        rounded = weight.to(PARAM)
    tl.store(pointer(row, 4, PARAM) + index, rounded, mask=exists)
    if HAS_MASTER:
        tl.store(pointer(row, 5, tl.float32) + element, weight, mask=exists)


@triton.jit
def learning_rate(lr, lr_tensor):
    """Return the learning rate: the tensor's, where there is one."""
    if lr_tensor is None:
        return lr
    else:
        return tl.load(lr_tensor).to(tl.float32)


def launch_step(
    kernel: Any,
    params: list[Tensor],
    grads: list[Tensor],
    indices: list[Tensor],
    states: dict[str, list[Tensor]],
    masters: list[Tensor],
    steps: list[Tensor],
    options: StepOptions,
    *arguments: float,
    **constants: bool,
) -> None:
    """Check the lists, count the step, update all tensors of one kind of dtypes in one launch; nothing waits.

    states: by name, in the order of the kernel's columns, fp32 [k], or uint8 where options have scales; arguments: the
    kernel's own numbers, after (table, lr, lr_tensor, grad_scale, found_inf, weight_decay); constants: the kernel's
    own.
    """
    _check_lists(params, {**states, "grads": grads, "indices": indices, "masters": masters, "steps": steps}, options)
    if not params:
        return
    device = params[0].device
    lr, lr_tensor, found_inf = options.lr, options.lr_tensor, options.found_inf
    if lr_tensor is not None and lr_tensor.device != device:
        lr, lr_tensor = float(lr_tensor), None
    for name, scalar in (("grad_scale", options.grad_scale), ("found_inf", found_inf)):
        if scalar is not None and scalar.device != device:
            raise ValueError(f"{name} must be on the parameters' device {device}, got {scalar.device}; move it there")
    grads = [grad.contiguous() for grad in grads]  # a copy has to live until the launch
    groups = _group(params, grads, indices, states, masters, steps, options)
    scalars = (float(lr), lr_tensor, options.grad_scale, found_inf, *map(float, (options.weight_decay, *arguments)))
    torch._foreach_add_(steps, 1 if found_inf is None else (found_inf == 0).float())
    constants |= {
        "MAXIMIZE": options.maximize,
        "HAS_PRETRAINED": options.pretrained is not None,
        "STOCHASTIC": options.seeds is not None,
        "LOW_BITS": options.scales is not None,
    }
    launch(kernel, groups, _CONSTANTS, device, *scalars, **constants)


def _check_lists(params: list[Tensor], lists: dict[str, list[Tensor]], options: StepOptions) -> None:
    """Raise unless there is one tensor a parameter in every list, and seeds where they are needed."""
    optional = {"pretrained": options.pretrained, "scales": options.scales}
    check_lengths(
        params=params, **lists, **{name: tensors for name, tensors in optional.items() if tensors is not None}
    )
    if options.seeds is not None and len(options.seeds) != len(params):
        raise ValueError(f"seeds must hold one number for each of the {len(params)} parameters, got {options.seeds}")
    if options.scales is not None and options.seeds is None:
        raise ValueError("states in 8 bits are rounded at random, got scales and no seeds; give seeds")


def _group(
    params: list[Tensor],
    grads: list[Tensor],
    indices: list[Tensor],
    states: dict[str, list[Tensor]],
    masters: list[Tensor],
    steps: list[Tensor],
    options: StepOptions,
) -> dict[tuple[Any, ...], list[Row]]:
    """Return the rows of the tables by the values of `_CONSTANTS`."""
    device = params[0].device
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for i, (param, grad, index, master, step) in enumerate(zip(params, grads, indices, masters, steps, strict=True)):
        k = count(index, param.numel())
        check_tensor("steps", i, step, 1, FLOAT32, device)
        if not k:
            continue
        compact = grad.numel() == k
        check_tensor("params", i, param, param.numel(), FLOATS, device)
        check_indices(f"indices[{i}]", index, param.numel(), device)
        check_tensor("grads", i, grad, k if compact else param.numel(), FLOATS, device)
        if master.numel():
            check_tensor("masters", i, master, k, FLOAT32, device)
        kind = (param.dtype, grad.dtype, index.dtype, compact, master.numel() > 0)
        columns = [tensor.data_ptr() for tensor in (grad, param, master, step)]
        row = (
            k,
            *index_columns(index, param.numel()),
            *columns,
            *_optional_columns(i, param, k, len(states), options),
            *_state_columns(i, k, states, options, device),
        )
        groups.setdefault(kind, []).append(row)
    return groups


def _optional_columns(i: int, param: Tensor, k: int, states: int, options: StepOptions) -> Row:
    """Return what columns 7 to 9 of the table hold for parameter i."""
    pretrained = seed = scales = 0
    if options.pretrained is not None:
        check_tensor("pretrained", i, options.pretrained[i], k, (param.dtype,), param.device)
        pretrained = options.pretrained[i].data_ptr()
    if options.seeds is not None:
        seed = mixed_seed(options.seeds[i])
    if options.scales is not None:
        check_tensor("scales", i, options.scales[i], states * code_blocks(k), FLOAT32, param.device)
        scales = options.scales[i].data_ptr()
    return pretrained, seed, scales


def _state_columns(i: int, k: int, states: dict[str, list[Tensor]], options: StepOptions, device: torch.device) -> Row:
    dtype = FLOAT32 if options.scales is None else (torch.uint8,)
    for name, tensors in states.items():
        check_tensor(name, i, tensors[i], k, dtype, device)
    return tuple(tensors[i].data_ptr() for tensors in states.values())
