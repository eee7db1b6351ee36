"""The selected entries of many tensors, in one launch for all whose entries are of one size."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseft.index_lists import count
from sparseft.kernels.checks import check_indices, check_lengths, check_tensor
from sparseft.kernels.multi_tensor import WORDS, Row, find_chunk, index_columns, launch, load_index, pointer


@triton.jit
def _gather_kernel(table, WORD: tl.constexpr, INDEX: tl.constexpr, CHUNK: tl.constexpr):
    """Columns of the table: k, indices, their blocks, tensor, selected."""
    row, element, exists = find_chunk(table, CHUNK)
    index = load_index(row, element, exists, INDEX)
    entry = tl.load(pointer(row, 3, WORD) + index, mask=exists, other=0)
    tl.store(pointer(row, 4, WORD) + element, entry, mask=exists)


def gather(tensors: list[Tensor], indices: list[Tensor]) -> list[Tensor]:
    """Return the selected entries of each tensor: [k_i], the tensor's dtype, any of at most 8 bytes an entry.

    indices: lists of k_i entries. A tensor that is not contiguous is copied first.
    """
    check_lengths(tensors=tensors, indices=indices)
    groups: dict[tuple[torch.dtype, torch.dtype], list[Row]] = {}
    sources, results = [], []
    for i, (tensor, index) in enumerate(zip(tensors, indices, strict=True)):
        source, k = tensor.contiguous(), count(index, tensor.numel())
        check_tensor("tensors", i, source, tensor.numel(), (tensor.dtype,), tensors[0].device)
        check_indices(f"indices[{i}]", index, tensor.numel(), tensors[0].device)
        result = tensor.new_empty(k)
        sources.append(source)  # a copy has to live until the launch
        results.append(result)
        if k:
            row = (k, *index_columns(index, tensor.numel()), source.data_ptr(), result.data_ptr())
            groups.setdefault((WORDS[tensor.element_size()], index.dtype), []).append(row)
    if groups:
        launch(_gather_kernel, groups, ("WORD", "INDEX"), tensors[0].device)
    return results
