"""How large what is composed of parameters alone is: the weight of a low-rank update, of a normalised direction."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor

from sparseft.fisher.nest import tensors


class Composed:
    """Follows what uncaptured operations make of parameters."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[weakref.ref[Tensor], frozenset[str]]] = {}
        self._sizes: list[tuple[frozenset[str], int]] = []

    def note(self, name: Callable[[Tensor], str | None], given: Sequence[Tensor], result: Any) -> None:
        """Note an operation that sees no input of the model.

        Args:
            name: tells the name of the parameter that a tensor is or holds entries of, None if it does not.
            given: the tensors that it got, but for what it changes.
            result: what it made, or changed.
        """
        names: set[str] = set()
        for tensor in given:
            if tensor.requires_grad:
                own = name(tensor)
                made, of = self._made.get(id(tensor), (None, frozenset()))
                if own is None and (made is None or made() is not tensor):
                    return
                names |= of if own is None else {own}
        if names:
            for tensor in tensors(result):
                if tensor.requires_grad:
                    self._made[id(tensor)] = weakref.ref(tensor), frozenset(names)
                    # a view takes no memory
                    self._sizes.append((frozenset(names), tensor.nbytes if tensor._base is None else 0))

    def nbytes(self, names: Collection[str]) -> int:
        """Return how many bytes depend on one of some parameters."""
        return sum(size for of, size in self._sizes if not of.isdisjoint(names))
