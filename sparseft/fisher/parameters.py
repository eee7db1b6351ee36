"""Which parameters are scored, and under which names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from sparseft.entries import check_no_entries
from sparseft.mask import aliases


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module that torch.compile wrapped, or the model itself."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def scored_parameters(model: nn.Module, names: Iterable[str] | None) -> dict[str, Tensor]:
    """Return the parameters to score, in the model's order; tied ones once, under their first name."""
    check_no_entries(model)
    first: dict[str, Tensor] = dict(model.named_parameters())
    if names is None:
        chosen = {name: p for name, p in first.items() if p.requires_grad}
    else:
        every = dict(model.named_parameters(remove_duplicate=False))
        asked = [names] if isinstance(names, str) else list(names)
        unknown = [name for name in asked if name not in every]
        if unknown:
            raise ValueError(f"names must be parameters of the model, got {unknown[:5]}; see model.named_parameters()")
        wanted = {id(every[name]) for name in asked}
        chosen = {name: p for name, p in first.items() if id(p) in wanted}
    if not chosen:
        raise ValueError("the model must have a parameter to score, got none that requires gradients; pass `names`")
    bad = [name for name, p in chosen.items() if not p.is_floating_point()]
    if bad:
        raise TypeError(
            f"scored parameters must be floating-point, got {bad[0]!r} of {chosen[bad[0]].dtype}; leave it out"
        )
    return chosen


def other_names(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return the other names of tied parameters, by first name."""
    found: dict[str, list[str]] = {}
    for other, first in aliases(model).items():
        if first in parameters:
            found.setdefault(first, []).append(other)
    return found
