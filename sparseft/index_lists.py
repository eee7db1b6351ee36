"""Which entries of a tensor are selected: lists of positions, and the same packed into about two bytes an entry.

A list holds flat positions in C order, sorted and unique: int32, or int64 for a tensor of 2^31 elements and more.
Packed, it is one int16 tensor: first, as int32, how many entries lie before each block of 8,192 elements, and how many
there are in all; then each entry's position in its block. At a density of 1 % that is 2.05 bytes an entry. Ops take
either. How many entries a packed list has follows from its length and from the size of its tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 8192
PACKED = torch.int16


def index_dtype(numel: int) -> torch.dtype:
    """Return the dtype of lists of positions in a tensor of `numel` elements."""
    return torch.int32 if numel < 2**31 else torch.int64


def pack(positions: Tensor, numel: int) -> Tensor:
    """Return a list of positions as a packed one. Nothing waits for a GPU.

    positions: int32 or int64 [k], k below 2^31, sorted and unique, in a tensor of `numel` elements. Returns int16 [n].
    """
    blocks = _blocks(numel)
    bounds = torch.arange(blocks + 1, device=positions.device, dtype=torch.int64) * BLOCK
    bounds[-1] = numel  # fits the dtype of positions, which the next multiple of BLOCK may not
    starts = torch.searchsorted(positions, bounds.to(positions.dtype), out_int32=True)
    return torch.cat([starts.view(PACKED), (positions % BLOCK).to(PACKED)])


def smallest(indices: Tensor, numel: int) -> Tensor:
    """Return an index list, packed where that takes fewer bytes: from a density of 0.03 % on."""
    if indices.dtype == PACKED or indices.numel() >= 2**31:
        return indices
    header = 2 * 2 * (_blocks(numel) + 1)
    packs = header + 2 * indices.numel() < indices.element_size() * indices.numel()
    return pack(indices, numel) if packs else indices


def positions(indices: Tensor, numel: int) -> Tensor:
    """Return what an index list, packed or not, holds: int32 or int64 [k]. Nothing waits for a GPU."""
    if indices.dtype != PACKED:
        return indices
    starts, offsets = _parts(indices, numel)
    dtype = index_dtype(numel)
    firsts = torch.arange(_blocks(numel), device=indices.device, dtype=dtype) * BLOCK
    return torch.repeat_interleave(firsts, starts.diff(), output_size=offsets.numel()) + offsets


def count(indices: Tensor, numel: int) -> int:
    """Return how many entries an index list into a tensor of `numel` elements has."""
    return indices.numel() - (2 * (_blocks(numel) + 1) if indices.dtype == PACKED else 0)


def check_packed(name: str, indices: Tensor, numel: int) -> None:
    """Raise unless a packed list, as it may come from a file, can be one of a tensor of `numel` elements.

    Whether its positions are sorted is not looked at.

    Raises:
        ValueError: it is cut short, or its counts are not those of its entries.
    """
    k = count(indices, numel)
    if indices.dim() == 1 and k >= 0 and indices.is_contiguous():
        starts, offsets = _parts(indices, numel)
        counted = int(starts[0]) == 0 and int(starts[-1]) == k and bool((starts.diff() >= 0).all())
        if counted and bool(((offsets >= 0) & (offsets < BLOCK)).all()):
            return
    raise ValueError(
        f"indices of {name} must be an index list of a tensor of {numel} elements, got a packed one of another, or a "
        "damaged one; use the mask that was made for this model"
    )


def _blocks(numel: int) -> int:
    return -(-numel // BLOCK)


def _parts(indices: Tensor, numel: int) -> tuple[Tensor, Tensor]:
    header = 2 * (_blocks(numel) + 1)
    return indices[:header].view(torch.int32), indices[header:]
