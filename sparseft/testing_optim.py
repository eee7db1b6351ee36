"""Inputs for the optimizers' ops; part of `testing`, which says what that is for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sparseft import low_bits
from sparseft.index_lists import count, positions

# op -> names of its states, its options, and calls that only it knows: what is odd, compact gradients, more options
OPTIMIZERS: dict[str, tuple[tuple[str, ...], dict[str, Any], list[tuple[str, bool, dict[str, Any]]]]] = {
    "adamw_": (
        ("exp_avgs", "exp_avg_sqs"),
        {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1},
        [("no memory", True, {"beta1": 0.0, "beta2": 0.0})],
    ),
    "lion_": (
        ("exp_avgs",),
        {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1},
        [("no memory", True, {"beta1": 0.0, "beta2": 0.0})],
    ),
    "sgd_": (
        ("momentum_buffers",),
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
        [
            ("no momentum", False, {"momentum": 0.0, "dampening": 0.0}),
            ("nesterov", True, {"dampening": 0.0, "nesterov": True}),
        ],
    ),
}
# GradScaler's found_inf is the number of devices that saw an overflow
_VARIANTS: list[tuple[str, bool, dict[str, Any]]] = [
    ("dense gradients", False, {}),
    ("compact gradients", True, {}),
    ("maximize, no decay", False, {"maximize": True, "weight_decay": 0.0}),
    ("lr as a tensor", False, {"lr": float("nan"), "lr_tensor": torch.tensor(0.02)}),
    ("decay to the pretrained", True, {"pretrained": []}),
    ("stochastic rounding", False, {"seeds": [1, 2, 3, 2**40, -5, 6]}),
    ("states in 8 bits", True, {"seeds": [1, 2, 3, 4, 5, 6], "scales": []}),
    ("loss scale", False, {"grad_scale": torch.tensor(4.0), "found_inf": torch.tensor(0.0)}),
    ("overflow: nothing may change", False, {"grad_scale": torch.tensor(4.0), "found_inf": torch.tensor(2.0)}),
]


def optimizer_calls(
    op: str, generator: torch.Generator, selected: Callable[[], tuple[list[Tensor], list[Tensor]]]
) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Yield what is odd about a call of an optimizer's op, its arguments and its keywords.

    selected: draws six parameters and their index lists.
    """
    names, options, own = OPTIMIZERS[op]
    for name, compact, extra in _VARIANTS + own:
        params, indices = selected()
        keywords = {**options, **extra}
        k = [count(index, param.numel()) for param, index in zip(params, indices, strict=True)]
        stateless = keywords.get("momentum") == 0
        states = [[_randn(generator, (0 if stateless else k_i,)) for k_i in k] for _ in names]
        grads = [_randn(generator, (k_i,) if compact else p.shape, p.dtype) for p, k_i in zip(params, k, strict=True)]
        if compact:
            # also gradients and running means of exactly 0, which have no sign
            for grad, state in zip(grads, states[0], strict=True):
                grad[:5] = state[:5] = 0
        if "exp_avg_sqs" in names:
            states[1] = [torch.rand(state.shape, generator=generator) for state in states[1]]
        masters = [_master(generator, param, index) for param, index in zip(params, indices, strict=True)]
        if "scales" in keywords:
            states, keywords["scales"] = encoded(states)
        elif "seeds" in keywords:
            masters[:-1] = [torch.empty(0)] * (len(masters) - 1)
        if "pretrained" in keywords:
            keywords["pretrained"] = [_randn(generator, (k_i,), p.dtype) for p, k_i in zip(params, k, strict=True)]
        steps = [torch.tensor(float(step)) for step in (0, 1, 9, 999, 0, 6)]
        yield name, (params, grads, indices, *states, masters, steps), keywords
    yield "no tensor", ([], [], [], *([] for _ in names), [], []), options


def encoded(states: list[list[Tensor]]) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Return states in 8 bits, and their scales, one tensor a parameter."""
    pairs = [[low_bits.encode(state, s == 1) for state in tensors] for s, tensors in enumerate(states)]
    codes = [[codes for codes, _ in of_state] for of_state in pairs]
    return codes, [torch.stack([scales for _, scales in of_parameter]) for of_parameter in zip(*pairs, strict=True)]


def decoded(states: list[list[Tensor]], scales: list[Tensor]) -> list[list[Tensor]]:
    """Return in fp32 what states in 8 bits hold."""
    return [
        [low_bits.decode(codes, of_parameter[s], s == 1) for codes, of_parameter in zip(tensors, scales, strict=True)]
        for s, tensors in enumerate(states)
    ]


def _randn(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(shape, generator=generator).to(dtype)
    # a lone value that is what two larger ones leave over has errors out of proportion
    return values.abs() if values.numel() == 1 else values


def _master(generator: torch.Generator, param: Tensor, index: Tensor) -> Tensor:
    if param.dtype == torch.float32:
        return torch.empty(0)
    current = param.view(-1)[positions(index, param.numel()).long()].float()
    # within half a unit of the weight, so that it still rounds to it
    return current * (1 + 0.2 * torch.finfo(param.dtype).eps * torch.rand(current.shape, generator=generator))
