"""Numbers in fewer bits than fp32, in plain PyTorch; csrc/low_bits.h and kernels/low_bits.py do the same, faster.

Random bits come from a hash of seed, step and position, so that every backend draws the same ones, and they do not
depend on who draws them, or in which order.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

CODE_BLOCK = 256  # entries with one scale
_DROPPED = 20  # bits of an fp32 number that a code has not
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


def random_of_state(random: Tensor, state: int) -> Tensor:
    """Return other random bits, for a state of the same entries."""
    return mix((random + 1 + state) & _32_BITS)


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


def code_blocks(k: int) -> int:
    """Return how many scales k entries in 8 bits have."""
    return -(-k // CODE_BLOCK)


def decode(codes: Tensor, scales: Tensor, squares: bool) -> Tensor:
    """Return the fp32 values [k] of uint8 codes [k] and a scale for every 256 of them, fp32.

    A code is the exponent and the first three digits of `magnitude / scale + 2^-octaves`, so that steps are about a
    tenth of what they are steps of down to there, and even below. A first state has a sign, and 15 octaves; a second
    one is a mean of squares, and has 31: what is 2^-15 of the block's largest gradient is still told from 0.
    """
    largest, offset = _code(squares)
    codes = codes.int()
    magnitudes = (((codes & largest) << _DROPPED) + offset).view(torch.float32) - _float(offset)
    signed = magnitudes if squares else torch.where(codes > largest, -magnitudes, magnitudes)
    return signed * scales.repeat_interleave(CODE_BLOCK)[: codes.numel()]


def encode(values: Tensor, squares: bool, random: Tensor | int = 1 << 19) -> tuple[Tensor, Tensor]:
    """Return the uint8 codes [k] of fp32 values [k], and their scales: the largest magnitude of every 256.

    random: 32 random bits a value, int64, with which it is rounded up with the probability that makes the mean right;
    to the nearest without. A mean of squares moves by a thousandth a step, which rounding to the nearest would never
    see; one that is not 0 does not become 0, because the next step divides by its root.
    """
    largest, offset = _code(squares)
    magnitudes = values.abs()
    blocks = torch.nn.functional.pad(magnitudes, (0, -len(values) % CODE_BLOCK)).view(-1, CODE_BLOCK)
    # as integers, among which NaN is the largest
    scales = blocks.view(torch.int32).amax(1).view(torch.float32)
    scale = scales.repeat_interleave(CODE_BLOCK)[: len(values)]
    shares = torch.where(scale == 0, 0, magnitudes / scale) + _float(offset)
    rounded = shares.view(torch.int32).long() + (random & ((1 << _DROPPED) - 1))
    codes = ((rounded >> _DROPPED) - (offset >> _DROPPED)).clamp(max=largest)
    if squares:
        codes = torch.where(magnitudes > 0, codes.clamp(min=1), codes)
    else:
        codes = codes | (values.view(torch.int32) < 0).long() << 7
    return codes.to(torch.uint8), scales


def _code(squares: bool) -> tuple[int, int]:
    """Return the largest code of a magnitude, and the bits of 2^-octaves."""
    return (255, (127 - 31) << 23) if squares else (127, (127 - 15) << 23)


def _float(bits: int) -> float:
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


def _cut(values: Tensor, bits: int, random: Tensor) -> Tensor:
    """Take the last bits away after adding random ones: their carry rounds up, in magnitude."""
    last = (1 << bits) - 1
    return ((values.view(torch.int32) + (random & last).int()) & ~last).view(torch.float32)
