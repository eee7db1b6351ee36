"""What a compact parameter knows: its leaf, where the leaf's entries lie, and how a dense gradient reaches it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparseft import ops  # noqa: F401  (registers torch.ops.sparseft)
from sparseft.entries import SelectedEntries

_FEW = 4  # lines are few if they are at most this part of all: several layers may each copy theirs from one input


@dataclasses.dataclass(frozen=True)
class Lines:
    """The rows, or columns, of a matrix in which anything is selected, when they are few.

    Attributes:
        numbers: int64, sorted.
        indices: where the selected entries lie in a matrix of these rows, or columns, alone: flat, sorted.
    """

    numbers: Tensor
    indices: Tensor


@dataclasses.dataclass(eq=False)
class Selection:
    """The selected entries of one parameter.

    Attributes:
        entries: the leaf.
        required_grad: whether the parameter itself required a gradient before.
        rows: of a matrix, the numbers of those in which anything is selected: int64, sorted.
        few_rows, few_columns: of a matrix, those in which anything is selected, if they are few.
    """

    entries: SelectedEntries
    required_grad: bool
    rows: Tensor | None = None
    few_rows: Lines | None = None
    few_columns: Lines | None = None

    @classmethod
    def of(cls, parameter: Tensor, entries: SelectedEntries, required_grad: bool) -> Selection:
        """Return what there is to know of a parameter."""
        if parameter.dim() != 2:
            return cls(entries, required_grad)
        height, width = parameter.shape
        indices, dtype = entries.positions.long(), entries.positions.dtype
        rows, row_slots = (indices // width).unique(return_inverse=True)
        columns, column_slots = (indices % width).unique(return_inverse=True)
        few_rows = few_columns = None
        if _FEW * len(rows) <= height:
            few_rows = Lines(rows, (row_slots * width + indices % width).to(dtype))
        if _FEW * len(columns) <= width:
            few_columns = Lines(columns, (indices // width * len(columns) + column_slots).to(dtype))
        return cls(entries, required_grad, rows, few_rows, few_columns)

    def tied(self, parameter: Tensor) -> Tensor:
        """Return the parameter as a tensor whose dense gradient is gathered and freed at once."""
        tied: Tensor = _Tie.apply(self.entries, parameter, self.entries.positions)  # type: ignore[no-untyped-call]
        return tied


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
