"""Numbers in fewer bits than fp32, in plain PyTorch; csrc/low_bits.h and kernels/low_bits.py do the same, faster.

Random bits come from a hash of seed, step and position, so that every backend draws the same ones, and they do not
depend on who draws them, or in which order.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

_32_BITS = 0xFFFFFFFF
_Integers = TypeVar("_Integers", int, Tensor)


def mix(x: _Integers) -> _Integers:
    """Return a bijection of 32-bit numbers in which every bit of the input changes half of the output's.

    x: int64 tensor or int. Constants from Wellons' search for such functions ("lowbias32").
    """
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _32_BITS
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _32_BITS
    return x ^ (x >> 16)


def mixed_seed(seed: int) -> int:
    """Return 32 bits that depend on all 64 of a seed."""
    return mix((seed & _32_BITS) ^ mix((seed >> 32) & _32_BITS))


def random_bits(seed: int, step: float, positions: Tensor) -> Tensor:
    """Return 32 random bits for each position of a parameter, int64 [k], at a step."""
    key, positions = mix(mixed_seed(seed) ^ int(step)), positions.long()
    return mix((mix((positions & _32_BITS) ^ key) + ((positions >> 32) ^ key)) & _32_BITS)


def round_stochastically(values: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """Round fp32 values to neighbours in bf16 or fp16, up with the probability that makes the mean right.

    random: 32 random bits a value, int64.
    """
    if dtype == torch.bfloat16:
        rounded = _cut(values, 16, random)
    else:
        # below the normal numbers their spacing stays that from 2^-14 on, where the magnitude is moved to be rounded
        moved_by = torch.where(values.abs() < 2.0**-14, 2.0**-14, 0.0)
        rounded = (_cut(values.abs() + moved_by, 13, random) - moved_by).copysign(values)
    return torch.where(values.isfinite(), rounded, values).to(dtype)


def _cut(values: Tensor, bits: int, random: Tensor) -> Tensor:
    """Take the last bits away after adding random ones: their carry rounds up, in magnitude."""
    last = (1 << bits) - 1
    return ((values.view(torch.int32) + (random & last).int()) & ~last).view(torch.float32)
