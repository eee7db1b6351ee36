"""Tensors in the arguments and results of operations: nests of tuples, lists and dicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor


def tensors(nest: Any) -> list[Tensor]:
    """Return the tensors of a nest."""
    found: list[Tensor] = []
    _collect(nest if isinstance(nest, tuple) else (nest,), found)
    return found


def _collect(parts: Iterable[Any], found: list[Tensor]) -> None:
    # for every operation of the model, so it must be quick
    for part in parts:
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, (tuple, list, dict)) and part:
            _collect(part.values() if isinstance(part, dict) else part, found)


def replaced(nest: Any, table: Mapping[int, Tensor]) -> Any:
    """Return a nest in which tensors are replaced by those that a table has for their ids."""
    if isinstance(nest, Tensor):
        return table.get(id(nest), nest)
    if isinstance(nest, (tuple, list)):
        parts = [replaced(part, table) for part in nest]
        if all(new is old for new, old in zip(parts, nest, strict=True)):
            return nest
        return type(nest)(*parts) if hasattr(nest, "_fields") else type(nest)(parts)
    if isinstance(nest, dict):
        return {key: replaced(value, table) for key, value in nest.items()}
    return nest
