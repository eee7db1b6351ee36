"""Packed index lists, as sparseft.index_lists has them: positions from entries, and entries from positions."""

from __future__ import annotations

import triton
import triton.language as tl

from sparseft.index_lists import BLOCK

_BLOCK = tl.constexpr(BLOCK)
# offsets a step of the search looks at: more of them make fewer steps, each of which waits for memory
_PROBES = tl.constexpr(8)


@triton.jit
def _parts(indices, blocks):
    starts = indices.to(tl.pointer_type(tl.int32))
    return starts, indices + 2 * (blocks + 1)


@triton.jit
def load_positions(indices, blocks, entry, exists):
    """Return the positions of entries of a packed list, int64.

    Every entry searches all blocks: to find those of a program's first and last entry before would take more steps,
    each of which waits for memory, than it would save.
    """
    starts, offsets = _parts(indices, blocks)
    wanted = entry.to(tl.int32)
    block = tl.zeros_like(wanted)
    left = blocks.to(tl.int32)
    while left > 1:
        half = left // 2
        block = tl.where(tl.load(starts + block + half) <= wanted, block + half, block)
        left -= half
    return block.to(tl.int64) * _BLOCK + tl.load(offsets + entry, mask=exists, other=0)


@triton.jit
def load_columns(indices, blocks, entry, exists, start):
    """Return how far entries of a packed list lie behind `start`, int32, of those that exist: less than a block."""
    _, offsets = _parts(indices, blocks)
    offset = tl.load(offsets + entry, mask=exists, other=0).to(tl.int32)
    # a run of entries may go on in the next block, where offsets begin anew
    return tl.where(exists, (offset - start.to(tl.int32)) & (_BLOCK - 1), 0)


@triton.jit
def lower_bound(indices, blocks, position):
    """Return how many entries of a packed list lie before each position, int32.

    position: int64 [n], also past the end of the tensor, which has at least one element.
    """
    starts, offsets = _parts(indices, blocks)
    block = tl.minimum(position // _BLOCK, blocks - 1)
    wanted = tl.minimum(position - block * _BLOCK, _BLOCK).to(tl.int32)[:, None]
    first, end = tl.load(starts + block), tl.load(starts + block + 1)
    left = tl.max(end - first)
    while left > 0:
        step = tl.cdiv(left, _PROBES)
        probe = first[:, None] + tl.arange(1, _PROBES + 1)[None, :] * step - 1
        before = tl.load(offsets + probe, mask=probe < end[:, None], other=_BLOCK) < wanted
        first += tl.sum(before.to(tl.int32), axis=1) * step
        left = step - 1
    return first
