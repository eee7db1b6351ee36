"""Numbers in fewer bits than fp32, as sparseft.low_bits has them."""

from __future__ import annotations

import triton
import triton.language as tl

from sparseft.kernels.multi_tensor import pointer
from sparseft.low_bits import CODE_BLOCK

_BLOCK = tl.constexpr(CODE_BLOCK)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_key(seed, step):
    """Return what random bits of a parameter are made from at a step; `seed` is mixed."""
    return _mix(seed.to(tl.uint32) ^ step.to(tl.uint32))


@triton.jit
def random_bits(key, position):
    """Return 32 random bits for each position."""
    position = position.to(tl.int64)
    high = (position >> 32).to(tl.uint32)
    return _mix(_mix(position.to(tl.uint32) ^ key) + (high ^ key))


@triton.jit
def _cut(value, random, BITS: tl.constexpr):
    last = (1 << BITS) - 1
    bits = value.to(tl.uint32, bitcast=True) + (random & last)
    return (bits >> BITS << BITS).to(tl.float32, bitcast=True)


@triton.jit
def round_stochastically(value, random, DTYPE: tl.constexpr):
    """Round fp32 values to neighbours in bf16 or fp16, up with the probability that makes the mean right."""
    bits = value.to(tl.uint32, bitcast=True)
    if DTYPE == tl.bfloat16:
        rounded = _cut(value, random, 16)
    else:
        # below the normal numbers their spacing stays that from 2^-14 on, where the magnitude is moved to be rounded
        magnitude = tl.abs(value)
        moved_by = tl.where(magnitude < 6.103515625e-05, 6.103515625e-05, 0.0)
        rounded = _cut(magnitude + moved_by, random, 13) - moved_by
        rounded = (rounded.to(tl.uint32, bitcast=True) | (bits & 0x80000000)).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7F800000) == 0x7F800000, value, rounded).to(DTYPE)


@triton.jit
def _scale_row(row, SCALES: tl.constexpr, STATE: tl.constexpr):
    blocks = (tl.load(row) + _BLOCK - 1) // _BLOCK
    return pointer(row, SCALES, tl.float32) + STATE * blocks


@triton.jit
def load_codes(row, element, exists, COLUMN: tl.constexpr, SCALES: tl.constexpr, STATE: tl.constexpr):
    """Return fp32 values of a state in 8 bits. Columns of the table: the codes, the scales of all states."""
    OFFSET: tl.constexpr = (127 - 31 if STATE == 1 else 127 - 15) << 23
    code = tl.load(pointer(row, COLUMN, tl.uint8) + element, mask=exists, other=0).to(tl.uint32)
    scale = tl.load(_scale_row(row, SCALES, STATE) + element // _BLOCK, mask=exists, other=0.0)
    largest = 255 if STATE == 1 else 127
    magnitude = (((code & largest) << 20) + OFFSET).to(tl.float32, bitcast=True)
    magnitude -= tl.full([], OFFSET, tl.uint32).to(tl.float32, bitcast=True)
    return tl.where(code > largest, -magnitude, magnitude) * scale


@triton.jit
def store_codes(
    row,
    element,
    exists,
    value,
    random,
    COLUMN: tl.constexpr,
    SCALES: tl.constexpr,
    STATE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write a state in 8 bits, each entry rounded up with the probability that makes the mean right."""
    OFFSET: tl.constexpr = (127 - 31 if STATE == 1 else 127 - 15) << 23
    bits = value.to(tl.uint32, bitcast=True)
    # as integers, among which NaN is the largest
    magnitude_bits = tl.where(exists, (bits & 0x7FFFFFFF).to(tl.int32), 0)
    largest = tl.max(tl.reshape(magnitude_bits, [CHUNK // _BLOCK, _BLOCK]), axis=1)
    scales = largest.to(tl.float32, bitcast=True)
    block = tl.min(element, axis=0) // _BLOCK + tl.arange(0, CHUNK // _BLOCK)
    tl.store(_scale_row(row, SCALES, STATE) + block, scales, mask=block * _BLOCK < tl.load(row))
    scale = tl.reshape(tl.broadcast_to(scales[:, None], [CHUNK // _BLOCK, _BLOCK]), [CHUNK])
    magnitude = magnitude_bits.to(tl.float32, bitcast=True)
    share = tl.where(scale > 0, tl.div_rn(magnitude, tl.where(scale > 0, scale, 1.0)), 0.0)
    share += tl.full([], OFFSET, tl.uint32).to(tl.float32, bitcast=True)
    rounded = share.to(tl.uint32, bitcast=True) + (_mix(random + (1 + STATE)) & ((1 << 20) - 1))
    code = (rounded >> 20) - (OFFSET >> 20)
    if STATE == 1:
        code = tl.minimum(code, 255)
        code = tl.where((code == 0) & (magnitude > 0), 1, code)
    else:
        code = tl.minimum(code, 127) | (bits >> 31 << 7)
    tl.store(pointer(row, COLUMN, tl.uint8) + element, code.to(tl.uint8), mask=exists)
