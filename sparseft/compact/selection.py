"""What a compact parameter knows: its leaf, where the leaf's entries lie, and how a dense gradient reaches it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparseft import ops  # noqa: F401  (registers torch.ops.sparseft)
from sparseft.entries import SelectedEntries
from sparseft.index_lists import index_dtype, smallest

_FEW = 4  # columns are few if they are at most this part of all: several layers may copy theirs from one input


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a linear layer computes of a matrix's gradient.

    Attributes:
        indices: the index list of the selected entries: in the matrix, or in the kept lines of it alone.
        kept: int64, sorted: the columns of the layer's input that selected entries meet, if they are few; else None.
    """

    indices: Tensor
    kept: Tensor | None = None


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
        rows, row_slots = (positions // width).unique(return_inverse=True)
        columns, column_slots = (positions % width).unique(return_inverse=True)
        linear = conv1d = Wanted(entries.index_list)
        if _FEW * len(columns) <= width:
            inside = positions // width * len(columns) + column_slots
            linear = Wanted(_index_list(inside, height * len(columns)), columns)
        if _FEW * len(rows) <= height:
            inside = row_slots * width + positions % width
            conv1d = Wanted(_index_list(inside, len(rows) * width), rows)
        return cls(entries, len(rows), linear, conv1d)

    def tied(self, parameter: Tensor) -> Tensor:
        """Return the parameter as a tensor whose dense gradient is gathered and freed at once."""
        tied: Tensor = _Tie.apply(self.entries, parameter, self.entries.index_list)  # type: ignore[no-untyped-call]
        return tied


def _index_list(positions: Tensor, numel: int) -> Tensor:
    return smallest(positions.to(index_dtype(numel)), numel)


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
