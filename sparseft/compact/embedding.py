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
from sparseft.index_lists import positions


class _Embedding(torch.autograd.Function):
    """weight[ids]; row `padding_idx` gets no gradient. rows: how many have selected entries."""

    @staticmethod
    def forward(
        ctx: Any, entries: Tensor, ids: Tensor, weight: Tensor, padding_idx: int | None, index_list: Tensor, rows: int
    ) -> Tensor:
        ctx.save_for_backward(ids, index_list)
        ctx.shape, ctx.padding_idx, ctx.rows, ctx.dtype = weight.shape, padding_idx, rows, entries.dtype
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ids, index_list = ctx.saved_tensors
        height, width = ctx.shape
        entries = positions(index_list, height * width).long()
        rows, columns, ids, last = entries // width, entries % width, ids.reshape(-1), ctx.rows
        selected = ids.new_zeros(height, dtype=torch.bool).index_fill_(0, rows, True)
        slot = selected.cumsum(0) - 1
        counts = selected[ids]
        if ctx.padding_idx is not None:
            counts &= ids != ctx.padding_idx
        # what no selected entry waits for goes to one more row
        sums = torch.ops.aten.embedding_dense_backward(
            dy.reshape(-1, width).float(), torch.where(counts, slot[ids], last), last + 1, -1, False
        )
        return sums[slot[rows], columns].to(ctx.dtype), None, None, None, None, None


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
    leaf = selection.entries
    y: Tensor = _Embedding.apply(leaf, input, weight, padding_idx, leaf.index_list, selection.rows)  # type: ignore[no-untyped-call]
    return y


RULES: dict[Callable[..., Any], Callable[..., Tensor | None]] = {F.embedding: _embedding}
