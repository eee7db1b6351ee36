"""BitFit: all biases, and nothing else. Source: arXiv 2106.10199. Needs no data."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def entries(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Return all positions of every bias among the named parameters.

    A bias is a parameter whose own name, the last part, is "bias", ends in "_bias" (a packed projection's, an
    expert's) or begins with "bias_" (a recurrent layer's): those of norms too.

    Differences from the published code: it takes every name with "bias" anywhere in it, and so T5's table of relative
    positions; and it trains the head whole, for which there is `dense=` of select. The paper's smaller variants are
    patterns: `include=["*query.bias", "*intermediate.dense.bias"]`. There is no order among biases: fewer of them are
    a matter of names, or of another method, `select("fish", ..., include="*bias", k=1000)`.

    Raises:
        ValueError: there is no bias.
    """
    parameters = dict(model.named_parameters())
    found = {
        name: torch.arange(parameters[name].numel(), device=parameters[name].device) for name in names if is_bias(name)
    }
    if not found:
        raise ValueError(
            f"method 'bitfit' needs biases, and none of the {len(names)} selectable parameters is one; many decoders "
            "have none: choose another method, or check include and exclude"
        )
    return found


def is_bias(name: str) -> bool:
    """Return whether a parameter is a bias, by the last part of its name."""
    own = name.rpartition(".")[2]
    return own == "bias" or own.endswith("_bias") or own.startswith("bias_")
