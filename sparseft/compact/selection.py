"""What a compact parameter knows: its leaf, where the leaf's entries lie, and how a dense gradient reaches it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparseft import ops
from sparseft.entries import SelectedEntries

_FEW = 4  # columns are few if they are at most this part of all: several layers may copy theirs from one input


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a linear layer computes of a matrix's gradient.

    Attributes:
        indices: where the selected entries lie: flat, sorted; in the matrix, or in the kept lines of it alone.
        plan: of `selected_grad_`.
        kept: int64, sorted: the columns of the layer's input that selected entries meet, if they are few; else None.
    """

    indices: Tensor
    plan: Tensor | None
    kept: Tensor | None


@dataclasses.dataclass(eq=False)
class Selection:
    """The selected entries of one parameter.

    Attributes:
        entries: the leaf.
        rows: of a matrix, the numbers of those in which anything is selected: int64, sorted.
        linear: of a matrix [O, I], what x @ matrix.T wants.
        conv1d: of a matrix [I, O], what x @ matrix wants.
    """

    entries: SelectedEntries
    rows: Tensor | None = None
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
        linear = conv1d = _wanted(entries.positions, height, width)
        if _FEW * len(columns) <= width:
            inside = positions // width * len(columns) + column_slots
            linear = _wanted(inside.to(entries.positions.dtype), height, len(columns), columns)
        if _FEW * len(rows) <= height:
            inside = row_slots * width + positions % width
            conv1d = _wanted(inside.to(entries.positions.dtype), len(rows), width, rows)
        return cls(entries, rows, linear, conv1d)

    def tied(self, parameter: Tensor) -> Tensor:
        """Return the parameter as a tensor whose dense gradient is gathered and freed at once."""
        tied: Tensor = _Tie.apply(self.entries, parameter, self.entries.positions)  # type: ignore[no-untyped-call]
        return tied


def _wanted(indices: Tensor, height: int, width: int, kept: Tensor | None = None) -> Wanted:
    return Wanted(indices, ops.selected_grad_plan(indices, height, width), kept)


class _Tie(torch.autograd.Function):
    """The identity, whose backward passes the gradient's selected entries to the leaf."""

    @staticmethod
    def forward(ctx: Any, entries: Tensor, parameter: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        (found,) = torch.ops.sparseft.gather([grad.contiguous()], [indices])
        return found.float(), None, None
