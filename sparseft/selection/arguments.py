"""Checks of arguments that methods share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real

from torch import nn


def check_count(name: str, value: object, *, or_all: bool = False) -> None:
    """Raise unless an argument is a whole number of at least 1. or_all: None is one too, for all there are."""
    if value is None and or_all:
        return
    otherwise = ", or None for all" if or_all else ""
    check_whole(name, value, otherwise)
    if value < 1:  # type: ignore[operator]
        raise ValueError(f"{name} must be at least 1{otherwise}, got {value}")


def check_whole(name: str, value: object, otherwise: str = "") -> None:
    """Raise unless an argument is a whole number; True and False are none."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number{otherwise}, got {value!r}")


def check_number(name: str, value: object) -> None:
    """Raise unless an argument is a finite number; True and False are none."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def checked_figure(name: str, returned: object, judged: object) -> float:
    """Return what a caller's function says of something that it judges, if it is a finite number."""
    try:
        figure = float(returned)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must return a number, got {returned!r}; return the figure of the {type(judged).__name__.lower()}"
        ) from error
    if not math.isfinite(figure):
        raise ValueError(
            f"{name} must return a finite number, got {figure} for {judged}; return the worst figure there is for a "
            "run that diverged"
        )
    return figure


def check_model(model: object) -> None:
    """Raise unless an argument is a model."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}; load weights into a model first, and pass "
            "that"
        )


def check_finite(ends: Mapping[str, tuple[float, float]]) -> None:
    """Raise unless the smallest and the largest score of every parameter are finite, as they are not beside a NaN."""
    bad = [name for name, (low, high) in ends.items() if not math.isfinite(low) or not math.isfinite(high)]
    if bad:
        raise ValueError(
            f"scores must be finite, got NaN or infinite values in {', '.join(bad[:4])}; drop the samples that caused "
            "them"
        )
