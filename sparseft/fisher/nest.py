"""Tensors in the arguments and results of operations: nests of tuples, lists and mappings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors(nest: Any) -> Iterator[Tensor]:
    """Yield the tensors of a nest."""
    if isinstance(nest, Tensor):
        yield nest
    elif isinstance(nest, (tuple, list)):
        for part in nest:
            yield from tensors(part)
    elif isinstance(nest, Mapping):
        for part in nest.values():
            yield from tensors(part)


def replaced(nest: Any, table: Mapping[int, Tensor]) -> Any:
    """Return a nest in which tensors are replaced by those that a table has for their ids."""
    if isinstance(nest, Tensor):
        return table.get(id(nest), nest)
    if isinstance(nest, (tuple, list)):
        return type(nest)([replaced(part, table) for part in nest])
    if isinstance(nest, dict):
        return {key: replaced(value, table) for key, value in nest.items()}
    return nest
