"""Embeddings: gradients are summed for the rows with selected entries, and no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparseft.compact.selection import Selection
from sparseft.entries import entries_of


class _Embedding(torch.autograd.Function):
    """weight[ids]; row `padding_idx` gets no gradient. rows: those with selected entries, sorted."""

    @staticmethod
    def forward(
        ctx: Any, entries: Tensor, ids: Tensor, weight: Tensor, padding_idx: int | None, indices: Tensor, rows: Tensor
    ) -> Tensor:
        ctx.save_for_backward(ids, indices, rows)
        ctx.width, ctx.padding_idx = weight.shape[1], padding_idx
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ids, indices, rows = ctx.saved_tensors
        ids, last = ids.reshape(-1), len(rows)
        slot = torch.searchsorted(rows, ids).clamp_(max=last - 1)
        counts = rows[slot] == ids
        if ctx.padding_idx is not None:
            counts &= ids != ctx.padding_idx
        # what no selected entry waits for goes to one more row
        sums = torch.ops.aten.embedding_dense_backward(
            dy.reshape(-1, ctx.width).float(), torch.where(counts, slot, last), last + 1, -1, False
        )
        entry_rows, entry_columns = indices.long() // ctx.width, indices.long() % ctx.width
        return sums[torch.searchsorted(rows, entry_rows), entry_columns], None, None, None, None, None


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    if entries_of(weight) is None or scale_grad_by_freq or not input.numel():
        return None
    if max_norm is not None:
        raise ValueError(
            "an embedding with max_norm changes its weights in the forward pass, which compact gradients do not "
            "follow; leave it out of the mask with exclude="
        )
    selection: Selection = weight.selection  # type: ignore[attr-defined]
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(weight)
    indices, rows = selection.entries.positions, selection.rows
    y: Tensor = _Embedding.apply(selection.entries, input, weight, padding_idx, indices, rows)  # type: ignore[no-untyped-call]
    return y


RULES: dict[Callable[..., Any], Callable[..., Tensor | None]] = {F.embedding: _embedding}
