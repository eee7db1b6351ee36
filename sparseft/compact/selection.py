"""What a compact parameter knows: its leaf, where the leaf's entries lie, and how a dense gradient reaches it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparseft import ops  # noqa: F401  (registers torch.ops.sparseft)
from sparseft.compact.bands import Bands
from sparseft.entries import SelectedEntries
from sparseft.index_lists import index_dtype, smallest

_FEW = 4  # columns are few if they are at most this part of all: several layers may copy theirs from one input


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a linear layer computes of a matrix's gradient.

    Attributes:
        spans: of bands, see `Bands`; None for single entries.
        where: the lines of the bands, or the index list of the entries; in the kept lines of the matrix, if any are.
        kept: int64, sorted: the columns of the layer's input that selected entries meet, if they are few; else None.
    """

    spans: tuple[tuple[int, int], ...] | None
    where: Tensor
    kept: Tensor | None


@dataclasses.dataclass(eq=False)
class Selection:
    """The selected entries of one parameter.

    Attributes:
        entries: the leaf.
        rows: of a matrix, how many have anything selected.
        linear: of a matrix [O, I], what x @ matrix.T wants.
        conv1d: of a matrix [I, O], what x @ matrix wants.
    """

    entries: SelectedEntries
    rows: int = 0
    linear: Wanted | None = None
    conv1d: Wanted | None = None

    @classmethod
    def of(cls, parameter: Tensor, entries: SelectedEntries) -> Selection:
        """Return what there is to know of a parameter."""
        if parameter.dim() != 2:
            return cls(entries)
        height, width = parameter.shape
        positions = entries.positions.long()
        row, column = positions // width, positions % width
        rows, row_slots = row.unique(return_inverse=True)
        columns, column_slots = column.unique(return_inverse=True)
        linear = conv1d = _wanted(row, column, (height, width), index_list=entries.index_list)
        if _FEW * len(columns) <= width:
            linear = _wanted(row, column_slots, (height, len(columns)), kept=columns)
        if _FEW * len(rows) <= height:
            conv1d = _wanted(row_slots, column, (len(rows), width), kept=rows)
        return cls(entries, len(rows), linear, conv1d)

    def tied(self, parameter: Tensor) -> Tensor:
        """Return the parameter as a tensor whose dense gradient is gathered and freed at once."""
        tied: Tensor = _Tie.apply(self.entries, parameter, self.entries.index_list)  # type: ignore[no-untyped-call]
        return tied


def _wanted(
    row: Tensor, column: Tensor, shape: tuple[int, int], index_list: Tensor | None = None, kept: Tensor | None = None
) -> Wanted:
    """Return what is wanted of a matrix of this shape. index_list: of the same entries, if there is one already."""
    bands = Bands.of(row, column, shape)
    if bands is not None:
        return Wanted(bands.spans, bands.lines, kept)
    if index_list is None:
        numel = shape[0] * shape[1]
        index_list = smallest((row * shape[1] + column).to(index_dtype(numel)), numel)
    return Wanted(None, index_list, kept)


class _Tie(torch.autograd.Function):
    """The identity, whose backward passes the gradient's selected entries to the leaf."""

    @staticmethod
    def forward(ctx: Any, entries: Tensor, parameter: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.dtype = entries.dtype
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        (found,) = torch.ops.sparseft.gather([grad.contiguous()], [indices])
        return found.to(ctx.dtype), None, None
