"""States of schedules: masks as parts of them, and what is checked before one is loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from numbers import Integral
from typing import Any

from torch import Tensor, nn

from sparseft.mask import Mask, check_indices
from sparseft.optim.base import SparseOptimizer
from sparseft.optim.left_out import new_state

# in place of a shape: whatever there is
ANY = object()

_DAMAGED = "it is damaged, load another one"


def mask_state(mask: Mask) -> dict[str, Any]:
    """Return a mask as tensors and plain values."""
    return {"indices": {name: mask.index_list(name) for name in mask}, **mask.header()}


def mask_from_state(state: Any, like: Mask) -> Mask:
    """Return the mask that `mask_state` was made of.

    Raises:
        ValueError: the state is damaged, or of a mask of other parameters than `like`.
    """
    check_parts("mask", state, dict.fromkeys(mask_state(like), ANY))
    try:
        mask = Mask(**state)
    except (AttributeError, TypeError) as error:
        raise ValueError(f"the state's mask is none ({error}); {_DAMAGED}") from error
    if (mask.shapes, mask.dense) != (like.shapes, like.dense):
        raise ValueError(
            "the state must be of a schedule that chooses from the same parameters, got one that chooses from "
            f"{_some(mask.shapes)} and trains {_some(mask.dense)} whole, in place of {_some(like.shapes)} and "
            f"{_some(like.dense)}; make the schedule with the model, include and dense of the saved one"
        )
    return mask


def check_counts(state: Mapping[str, Any]) -> None:
    """Raise unless a state's steps are counted."""
    for name in ("steps", "skipped"):
        if not isinstance(state[name], Integral) or state[name] < 0:
            raise ValueError(
                f"the state's {name} must be a whole number of at least 0, got {state[name]!r}; {_DAMAGED}"
            )


def check_parts(where: str, saved: Any, like: Any) -> None:
    """Raise unless a part of a state is made like another: mappings of the same names, tensors of the same shapes.

    where: its name in the state. like: a shape, None, ANY, or a mapping of such.
    """
    place = f"the state's {where}" if where else "the state"
    if like is ANY:
        return
    if isinstance(like, Mapping):
        if not isinstance(saved, Mapping):
            raise ValueError(f"{place} must have {_some(like)}, got {_kind(saved)}; {_DAMAGED}")
        if saved.keys() != like.keys():
            missing, unknown = ([n for n in a if n not in b] for a, b in ((like, saved), (saved, like)))
            raise ValueError(
                f"{place} must have {_some(like)}, got one without {_some(missing)} and with {_some(unknown)} "
                f"besides; {_DAMAGED}"
            )
        for name, part in like.items():
            check_parts(f"{where}.{name}" if where else name, saved[name], part)
    elif like is None:
        if saved is not None:
            raise ValueError(f"{place} must be None at its step, got {_kind(saved)}; {_DAMAGED}")
    elif not isinstance(saved, Tensor) or tuple(saved.shape) != tuple(like):
        got = list(saved.shape) if isinstance(saved, Tensor) else _kind(saved)
        raise ValueError(f"{place} must be a tensor of shape {list(like)}, got {got}; {_DAMAGED}")


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, Sequence[int]]:
    """Return the shapes of tensors, as `check_parts` takes them."""
    return {name: tensor.shape for name, tensor in tensors.items()}


def check_left_out(saved: Any, mask: Mask, optimizer: SparseOptimizer, model: nn.Module) -> None:
    """Raise unless states that are kept for later can be those of the entries that a mask leaves out."""
    names = saved.keys() & mask.shapes.keys() if isinstance(saved, Mapping) else ()
    check_parts("left_out", saved, dict.fromkeys(names, ANY))
    for name, pair in saved.items():
        place, parameter = f"left_out.{name}", model.get_parameter(name)
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"the state's {place} must be entries and their state, got {_kind(pair)}; {_DAMAGED}")
        index, kept = pair
        left = parameter.numel() - (mask[name].numel() if name in mask else 0)
        check_parts(place, index, (left,))
        try:
            check_indices(name, index, parameter.numel())
        except TypeError as error:
            raise ValueError(f"the state's {place} holds no entries ({error}); {_DAMAGED}") from error
        check_parts(place, kept, shapes(new_state(optimizer, parameter, index.to(parameter.device))))


def _some(names: Collection[Any]) -> str:
    """Return the number of names, and the first of them."""
    if not names:
        return "none"
    return f"{len(names)} ({', '.join(map(str, list(names)[:3]))}{', ...' if len(names) > 3 else ''})"


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"
