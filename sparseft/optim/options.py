"""The options that every sparse optimizer has beside those of its rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict


class SharedOptions(TypedDict, total=False):
    """Options of every optimizer, and of each of its parameter groups.

    maximize: ascend instead of descend.
    decay_to: what weight decay pulls to: "zero", or "pretrained", the values that the selected entries have at their
        first step. Those are kept as a state, in the parameter's dtype.
    max_norm: gradients are scaled down, in the step itself, when the norm of all selected gradients is larger, as
        `torch.nn.utils.clip_grad_norm_` would do to them; None: not. The norm is that of all groups together.
    rounding: how a bf16 or fp16 weight takes steps smaller than its last digit. "master": its selected entries are
        kept in fp32, too, and rounded to the nearest. "stochastic": they are not, which saves 4 bytes each; a weight
        is rounded to either neighbour, with the probability that makes the mean right. With compact gradients
        the leaf is a master that is there anyway, unless leaves hold no values.
    state_bits: 32, or 8: the optimizer's running means take a byte an entry, and an fp32 scale for every 256 of them.
        They keep about a digit, from the block's largest gradient down to 2^-15 of it, rounded at random: AdamW's
        steps vary by an eighth or so, and are right in the mean.
    seed: of random numbers, 0 to 2**62. They are a hash of it, the parameter's place in the optimizer, its step count
        and the entry's position, so that a run repeats bit for bit on any number of threads, and when it is resumed.
    """

    maximize: bool
    decay_to: Literal["zero", "pretrained"]
    max_norm: float | None
    rounding: Literal["master", "stochastic"]
    state_bits: Literal[8, 32]
    seed: int


DEFAULTS: dict[str, Any] = {
    "maximize": False,
    "decay_to": "zero",
    "max_norm": None,
    "rounding": "master",
    "state_bits": 32,
    "seed": 0,
}

_CHOICES: dict[str, tuple[Any, ...]] = {
    "decay_to": ("zero", "pretrained"),
    "rounding": ("master", "stochastic"),
    "state_bits": (8, 32),
}


def check_options(group: Mapping[str, Any]) -> None:
    """Raise unless what a parameter group asks for is there to be had.

    Raises:
        ValueError: says which option must be what.
    """
    for option in ("lr", "weight_decay"):
        if not group[option] >= 0:
            raise ValueError(f"{option} must be at least 0, got {group[option]}")
    for option, choices in _CHOICES.items():
        if group[option] not in choices:
            raise ValueError(f"{option} must be one of {', '.join(map(repr, choices))}, got {group[option]!r}")
    if group["max_norm"] is not None and not group["max_norm"] > 0:
        raise ValueError(f"max_norm must be above 0, or None for no clipping, got {group['max_norm']}")
    if not isinstance(group["seed"], int) or not 0 <= group["seed"] <= 2**62:
        raise ValueError(f"seed must be an integer from 0 to 2**62, got {group['seed']!r}")
