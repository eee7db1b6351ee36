"""The selected entries of many tensors, in one launch for all whose entries are of one size."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseft.kernels.checks import check_lengths, check_tensor
from sparseft.kernels.multi_tensor import INDICES, WORDS, Row, find_chunk, launch, pointer


@triton.jit
def _gather_kernel(table, WORD: tl.constexpr, INDEX: tl.constexpr, CHUNK: tl.constexpr):
    """Columns of the table: k, indices, tensor, selected."""
    row, element, exists = find_chunk(table, CHUNK)
    index = tl.load(pointer(row, 1, INDEX) + element, mask=exists, other=0)
    entry = tl.load(pointer(row, 2, WORD) + index, mask=exists, other=0)
    tl.store(pointer(row, 3, WORD) + element, entry, mask=exists)


def gather(tensors: list[Tensor], indices: list[Tensor]) -> list[Tensor]:
    """Return the selected entries of each tensor: [k_i], the tensor's dtype, any of at most 8 bytes an entry.

    indices: int32 or int64 [k_i]. A tensor that is not contiguous is copied first.
    """
    check_lengths(tensors=tensors, indices=indices)
    groups: dict[tuple[torch.dtype, torch.dtype], list[Row]] = {}
    sources, results = [], []
    for i, (tensor, index) in enumerate(zip(tensors, indices, strict=True)):
        source, k = tensor.contiguous(), index.numel()
        check_tensor("tensors", i, source, tensor.numel(), (tensor.dtype,), tensors[0].device)
        check_tensor("indices", i, index, k, INDICES, tensors[0].device)
        result = tensor.new_empty(k)
        sources.append(source)  # a copy has to live until the launch
        results.append(result)
        if k:
            row = (k, index.data_ptr(), source.data_ptr(), result.data_ptr())
            groups.setdefault((WORDS[tensor.element_size()], index.dtype), []).append(row)
    if groups:
        launch(_gather_kernel, groups, ("WORD", "INDEX"), tensors[0].device)
    return results
