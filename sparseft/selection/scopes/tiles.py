"""Cutting a parameter into rows, columns or blocks, all at once, and putting it together again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseft.selection.scopes.layouts import Layout

Structure = Literal["row", "column", "block"]
_CHUNK = 1 << 20  # entries looked at together, which bounds temporaries


class Tiles:
    """The groups of a parameter, as a grid of tiles of its layout's view.

    Tiles at the far edge of a grid may be smaller: they are filled up. Groups are numbered in the order of the grid,
    entries of a group in the order of the parameter.

    Args:
        layout: of the parameter.
        kind: "row", "column" or "block".
        block: rows and columns of a block; kernels of a convolution stay whole, and matrices of a stack apart.

    Attributes:
        count: number of groups.
        size: number of entries of a group that is whole.
    """

    def __init__(self, layout: Layout, kind: Structure, block: tuple[int, int] | None = None) -> None:
        self._shape = layout.shape
        self._extents = tuple(
            max(1, min(size, _extent(layout, kind, block, dim, size))) for dim, size in enumerate(layout.shape)
        )
        self._grid = tuple(-(-size // extent) for size, extent in zip(self._shape, self._extents, strict=True))
        self.count, self.size = math.prod(self._grid), math.prod(self._extents)

    def sizes(self, device: torch.device) -> Tensor:
        """Return the number of entries of each group: int64 [count]."""
        sizes = torch.ones(1, dtype=torch.int64, device=device)
        for size, extent, steps in zip(self._shape, self._extents, self._grid, strict=True):
            along = torch.full((steps,), extent, device=device)
            along[-1] = size - extent * (steps - 1)
            sizes = (sizes[:, None] * along).flatten()
        return sizes

    def split(self, values: Tensor, fill: float) -> Tensor:
        """Return the parameter's values by group: [count, size], a view where the parameter allows it."""
        values = values.reshape(self._shape)
        missing = [steps * extent - size for size, extent, steps in self._dims()]
        if any(missing):
            values = F.pad(values, [pad for most in reversed(missing) for pad in (0, most)], value=fill)
        pairs = [length for _, extent, steps in self._dims() for length in (steps, extent)]
        dims = range(len(pairs))
        return values.reshape(pairs).permute(*dims[::2], *dims[1::2]).reshape(self.count, self.size)

    def join(self, groups: Tensor) -> Tensor:
        """Return a tensor of [count, size] in the order of the parameter: flat."""
        dims = len(self._shape)
        mixed = groups.reshape(*self._grid, *self._extents).permute(*(n for d in range(dims) for n in (d, dims + d)))
        padded = mixed.reshape([steps * extent for _, extent, steps in self._dims()])
        return padded[tuple(slice(size) for size in self._shape)].reshape(-1)

    def chunks(self) -> Iterator[slice]:
        """Yield slices of groups, a bounded number of entries each."""
        step = max(1, _CHUNK // self.size)
        return (slice(begin, begin + step) for begin in range(0, self.count, step))

    def _dims(self) -> list[tuple[int, int, int]]:
        return list(zip(self._shape, self._extents, self._grid, strict=True))


def _extent(layout: Layout, kind: Structure, block: tuple[int, int] | None, dim: int, size: int) -> int:
    """Return how far a group reaches along a dimension."""
    row, column = dim in layout.rows, dim in layout.columns
    if kind == "row":
        return 1 if row else size
    if kind == "column":
        return 1 if column else size
    if row and column:
        return 1
    rows, columns = block or (1, 1)
    return rows if row else columns if column else size
