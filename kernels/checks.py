"""What every launcher over lists checks before the first write: a wrong size here is a stray write on the GPU."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from sparseft.index_lists import PACKED, count
from sparseft.kernels.multi_tensor import INDICES

FLOAT32 = (torch.float32,)


def check_lengths(**lists: list[Tensor]) -> None:
    """Raise unless all lists are of one length."""
    lengths = {name: len(tensors) for name, tensors in lists.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"lists must hold one tensor a parameter, got lengths {lengths}; fill up with empty tensors")


def check_tensor(
    name: str, i: int, tensor: Tensor, numel: int, dtypes: Collection[torch.dtype], device: torch.device
) -> None:
    """Raise unless `tensor`, item i of the list `name`, is contiguous and has this size, a right dtype, the device."""
    known = tensor.dtype in dtypes
    if known and tensor.numel() == numel and tensor.device == device and tensor.is_contiguous():
        return
    layout = "contiguous" if tensor.is_contiguous() else "strided"
    wanted = " or ".join(str(dtype) for dtype in dtypes)
    raise (ValueError if known else TypeError)(
        f"{name}[{i}] must be a contiguous {wanted} tensor of {numel} elements on {device}, got a {layout} "
        f"{tensor.dtype} tensor of {tensor.numel()} on {tensor.device}; convert it before the call"
    )


def check_indices(name: str, indices: Tensor, numel: int, device: torch.device) -> None:
    """Raise unless `indices` can be an index list of a tensor of `numel` elements.

    What the list holds is not looked at: that would wait for the GPU.
    """
    if indices.dtype not in INDICES:
        raise TypeError(
            f"{name} must be int32 or int64 positions, or a packed list, int16, got {indices.dtype}; convert it first"
        )
    if indices.dim() != 1 or not indices.is_contiguous() or indices.device != device:
        layout = "contiguous" if indices.is_contiguous() else "strided"
        raise ValueError(
            f"{name} must be a contiguous list on {device}, got a {layout} tensor {tuple(indices.shape)} on "
            f"{indices.device}; convert it before the call"
        )
    if indices.dtype == PACKED:
        _check_packed(name, indices, numel)


def _check_packed(name: str, indices: Tensor, numel: int) -> None:
    k = count(indices, numel)
    if not 0 <= k <= min(numel, 2**31 - 1):
        raise ValueError(
            f"{name} must be a packed list of a tensor of {numel} elements, of {indices.numel() - k} int16 numbers "
            f"and one for each entry, got {indices.numel()}; pack it for this tensor"
        )
    if indices.data_ptr() % 4:
        raise ValueError(
            f"{name} must lie at a multiple of 4 bytes, since a packed list begins with int32 numbers, got address "
            f"{indices.data_ptr()}; clone it"
        )
