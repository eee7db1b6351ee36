"""Deltas in and out of a model, bit for bit, in one launch for all parameters whose entries are of one size."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseft.index_lists import count
from sparseft.kernels.checks import check_indices, check_lengths, check_tensor
from sparseft.kernels.multi_tensor import WORDS, Row, find_chunk, index_columns, launch, load_index, pointer


@triton.jit
def _delta_swap_kernel(table, WORD: tl.constexpr, INDEX: tl.constexpr, CHUNK: tl.constexpr):
    """Columns of the table: k, indices, their blocks, parameter, values."""
    row, element, exists = find_chunk(table, CHUNK)
    index = load_index(row, element, exists, INDEX)
    selected, values = pointer(row, 3, WORD) + index, pointer(row, 4, WORD) + element
    replaced = tl.load(selected, mask=exists, other=0)
    value = tl.load(values, mask=exists, other=0)
    tl.store(selected, value, mask=exists)
    tl.store(values, replaced, mask=exists)


def delta_swap_(params: list[Tensor], indices: list[Tensor], values: list[Tensor]) -> None:
    """Exchange the selected entries of each parameter with `values` [k_i], bit for bit.

    params: contiguous, any dtype of at most 8 bytes; indices: lists of k_i entries; values: the parameter's dtype.
    Applies a delta and keeps what it replaced in one pass: the same call again restores it.
    """
    check_lengths(params=params, indices=indices, values=values)
    groups: dict[tuple[torch.dtype, torch.dtype], list[Row]] = {}
    for i, (param, index, value) in enumerate(zip(params, indices, values, strict=True)):
        device, dtype, k = params[0].device, (param.dtype,), count(index, param.numel())
        check_tensor("params", i, param, param.numel(), dtype, device)
        check_indices(f"indices[{i}]", index, param.numel(), device)
        check_tensor("values", i, value, k, dtype, device)
        if k:
            row = (k, *index_columns(index, param.numel()), param.data_ptr(), value.data_ptr())
            groups.setdefault((WORDS[param.element_size()], index.dtype), []).append(row)
    if groups:
        launch(_delta_swap_kernel, groups, ("WORD", "INDEX"), params[0].device)
