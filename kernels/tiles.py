"""How a Fisher diagonal is cut into tiles, one a program: which sizes there are, and which a launch takes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

# tiles of the weight that share rows of x and dy run next to each other: this many rows of tiles at a time
GROUP_O = 8


class Tile(NamedTuple):
    """What a program computes, [block_o, block_i], how many tokens it loads at a time, and its resources."""

    block_o: int
    block_i: int
    block_t: int
    num_warps: int
    num_stages: int

    def programs(self, out_features: int, in_features: int) -> int:
        """Return how many tiles a weight takes."""
        return triton.cdiv(out_features, self.block_o) * triton.cdiv(in_features, self.block_i)


def available(dtype: torch.dtype, aligned: bool, block_t: int, selected: bool = False) -> tuple[Tile, ...]:
    """Return the tiles there are, largest first; 16-bit inputs are loaded `block_t` tokens at a time.

    A table rather than autotuning: tuning would run on the caller's `fisher` and stall at every new layer shape, and
    the choice follows from few facts. Two fp32 tiles stay in registers, which bounds the tile at 128 x 128. Without
    alignment to 16 elements every element has an address of its own: small tiles, more warps. With `selected` entries
    marked in registers too, only the form that loads 64 tokens at a time leaves enough of them for large tiles.
    """
    if dtype == torch.float32:
        return (Tile(64, 64, 16, 4 if aligned else 8, 3),)
    if not aligned:
        return (Tile(64, 64, 32, 8, 3),)
    small = Tile(64, 64, block_t, 4, 4)
    if selected and block_t < 64:
        return (small,)
    return Tile(128, 128, block_t, 8, 3), Tile(64, 128, block_t, 4, 3), small


def choose(layers: Sequence[tuple[Tensor, Tensor]], selected: bool = False) -> Tile:
    """Return the largest tile of which there is one for every multiprocessor, or else the smallest.

    layers: pairs of x and dy, all of one dtype and `aligned` alike.
    """
    x, dy = layers[0]
    hopper, multiprocessors = gpu(x.device)
    # before Hopper, 64 tokens at a time would take more registers than there are
    block_t = 64 if hopper and max(x.shape[1] for x, _ in layers) > 32 else 32
    choices = available(x.dtype, aligned(x, dy), block_t, selected)
    for tile in choices:
        if sum(tile.programs(dy.shape[2], x.shape[2]) for x, dy in layers) >= multiprocessors:
            return tile
    return choices[-1]


def aligned(x: Tensor, dy: Tensor) -> bool:
    """Return whether loads of x and dy can be merged into 16-byte ones: what Triton looks at is divisible by 16."""
    sizes = (x.shape[2], dy.shape[2], *x.stride()[:2], *dy.stride()[:2], x.data_ptr(), dy.data_ptr())
    return not any(size % 16 for size in sizes)


def constants(x: Tensor, tile: Tile, squared: bool | None = None) -> dict[str, Any]:
    """Return what a kernel of this tile is compiled with; squared: None for a kernel that never takes squares."""
    return {
        **({} if squared is None else {"SQUARED": squared}),
        "BLOCK_O": tile.block_o,
        "BLOCK_I": tile.block_i,
        "BLOCK_T": tile.block_t,
        "GROUP_O": GROUP_O,
        # the interpreter's tl.dot multiplies the bit patterns of bf16 numbers
        "UPCAST": triton.knobs.runtime.interpret and x.dtype == torch.bfloat16,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
        # left alone, the assembler spills a few registers for more programs a multiprocessor; without tensor cores,
        # where values pass through many more registers, it is when it is bound that it spills
        "maxnreg": 248 if x.dtype.itemsize == 2 else None,
    }


def has_descriptors(x: Tensor, dy: Tensor) -> bool:
    """Return whether the GPU's copy engine can load x and dy: Hopper, 16-bit elements, rows of whole 16 bytes."""
    strides = (*x.stride()[:2], *dy.stride()[:2])
    return gpu(x.device)[0] and x.dtype.itemsize == 2 and aligned(x, dy) and all(0 < s < 2**39 for s in strides)


@functools.lru_cache
def gpu(device: torch.device) -> tuple[bool, int]:
    """Return whether a GPU has Hopper's tensor core instructions, and how many multiprocessors."""
    if device.type != "cuda":  # the interpreter: any answer gives the same numbers
        return True, 132
    properties = torch.cuda.get_device_properties(device)
    # consumer chips after Hopper (compute capability 12) have Ampere's tensor core instructions
    return properties.major in (9, 10), properties.multi_processor_count
