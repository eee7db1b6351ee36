"""The options that every sparse optimizer has beside those of its rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict


class SharedOptions(TypedDict, total=False):
    """Options of every optimizer, and of each of its parameter groups.

    maximize: ascend instead of descend.
    decay_to: what weight decay pulls to: "zero", or "pretrained", the values that the selected entries have at their
        first step. Those are kept as a state, in the parameter's dtype.
    """

    maximize: bool
    decay_to: Literal["zero", "pretrained"]


DEFAULTS: dict[str, Any] = {"maximize": False, "decay_to": "zero"}

_CHOICES = {"decay_to": ("zero", "pretrained")}


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
