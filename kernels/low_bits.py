"""Numbers in fewer bits than fp32, as sparseft.low_bits has them."""

from __future__ import annotations

import triton
import triton.language as tl


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
