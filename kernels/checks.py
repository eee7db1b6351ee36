"""What every launcher over lists checks before the first write: a wrong size here is a stray write on the GPU."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

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
