"""Sum over samples of squared per-sample weight gradients of a Linear; none of them ever leaves the registers."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# tiles of the weight that share rows of x and dy run next to each other: this many rows of tiles at a time
_GROUP_O = 8


@triton.jit
def _tile_position(out_features, in_features, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, GROUP_O: tl.constexpr):
    tiles_o, tiles_i = tl.cdiv(out_features, BLOCK_O), tl.cdiv(in_features, BLOCK_I)
    program = tl.program_id(0)
    first_o = program // (GROUP_O * tiles_i) * GROUP_O
    group_o = tl.minimum(tiles_o - first_o, GROUP_O)
    within = program % (GROUP_O * tiles_i)
    return first_o + within % group_o, within // group_o


# batches differ in these two from step to step; compiling for their values would stall training
@triton.jit(do_not_specialize=["n_samples", "n_tokens"])
def _fisher_linear_kernel(
    fisher,
    x,
    dy,
    sample_weight,
    n_samples,
    n_tokens,
    out_features,
    in_features,
    fisher_stride_o,
    fisher_stride_i,
    x_stride_n,
    x_stride_t,
    dy_stride_n,
    dy_stride_t,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP_O: tl.constexpr,
    SQUARED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program owns one tile of `fisher` for all samples: no atomics, the same bits every time.

    SQUARED: x and dy hold squares already. UPCAST: multiply in fp32, for the interpreter.
    """
    tile_o, tile_i = _tile_position(out_features, in_features, BLOCK_O, BLOCK_I, GROUP_O)
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    t = tl.arange(0, BLOCK_T)
    inside_o, inside_i = o < out_features, i < in_features
    dy_tile = dy + t[:, None].to(tl.int64) * dy_stride_t + o[None, :]
    x_tile = x + t[:, None].to(tl.int64) * x_stride_t + i[None, :]
    blocks = tl.cdiv(n_tokens, BLOCK_T)
    grad = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    # One loop over the token blocks of all samples: with a loop a sample, the pipeline of loads would drain each time.
    # Nothing that steers it is loaded inside, because such a load would wait for all those in flight.
    for block in tl.range(0, n_samples * blocks):
        n = (block // blocks).to(tl.int64)
        first = (block % blocks * BLOCK_T).to(tl.int64)
        present = (t < n_tokens - first)[:, None]
        dy_block = tl.load(
            dy_tile + (n * dy_stride_n + first * dy_stride_t), mask=present & inside_o[None, :], other=0.0
        )
        x_block = tl.load(x_tile + (n * x_stride_n + first * x_stride_t), mask=present & inside_i[None, :], other=0.0)
        if UPCAST:
            dy_block, x_block = dy_block.to(tl.float32), x_block.to(tl.float32)
        grad = tl.dot(tl.trans(dy_block), x_block, grad, input_precision="ieee")
        if first + BLOCK_T >= n_tokens:
            squared = grad if SQUARED else grad * grad
            if sample_weight is not None:
                squared *= tl.load(sample_weight + n)
            total += squared
            grad = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    address = fisher + o[:, None].to(tl.int64) * fisher_stride_o + i[None, :].to(tl.int64) * fisher_stride_i
    inside = inside_o[:, None] & inside_i[None, :]
    tl.store(address, tl.load(address, mask=inside, other=0.0) + total, mask=inside)


def fisher_linear_(fisher: Tensor, x: Tensor, dy: Tensor, sample_weight: Tensor | None = None) -> None:
    """Add `sum_n w_n * (sum_t dy[n,t,:] outer x[n,t,:])**2` to the running Fisher diagonal of a Linear weight.

    fisher: fp32 [O, I]; x: [N, T, I]; dy: [N, T, O], same dtype as x (fp32, bf16, fp16); sample_weight: fp32 [N] or
    None for ones. Accumulates in fp32; fp32 inputs are multiplied in fp32, never in TF32, which keeps three digits.
    x and dy may have any strides over samples and tokens; where the features are not contiguous, a copy is made.
    Source: FISH Mask, arXiv 2111.09839, equation 4, for one layer.
    """
    _check(fisher, x, dy, sample_weight)
    if not (fisher.numel() and x.shape[0] and x.shape[1]):
        return
    squared = x.shape[1] == 1
    if squared:
        # the square of an outer product is the outer product of the squares: one product serves all samples, which
        # become the tokens of one
        x, dy = (tensor.float().square().transpose(0, 1) for tensor in (x, dy))
        if sample_weight is not None:
            dy, sample_weight = dy * sample_weight[:, None], None
    x, dy = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (x, dy))
    launch(fisher, x, dy, sample_weight, choose_tile(fisher, x, dy), squared)


class Tile(NamedTuple):
    """What a program computes, [block_o, block_i], how many tokens it loads at a time, and its resources."""

    block_o: int
    block_i: int
    block_t: int
    num_warps: int
    num_stages: int


def tiles(dtype: torch.dtype, aligned: bool, block_t: int) -> tuple[Tile, ...]:
    """Return the tiles there are, largest first; 16-bit inputs are loaded `block_t` tokens at a time.

    A table rather than autotuning: tuning would run on the caller's `fisher` and stall at every new layer shape, and
    the choice follows from few facts. Two fp32 tiles stay in registers, which bounds the tile at 128 x 128. Without
    alignment to 16 elements every element has an address of its own: small tiles, more warps.
    """
    if dtype == torch.float32:
        return (Tile(64, 64, 16, 4 if aligned else 8, 3),)
    if not aligned:
        return (Tile(64, 64, 32, 8, 3),)
    return Tile(128, 128, block_t, 8, 3), Tile(64, 128, block_t, 4, 3), Tile(64, 64, block_t, 4, 4)


def choose_tile(fisher: Tensor, x: Tensor, dy: Tensor) -> Tile:
    """Return the largest tile of which there is one for every multiprocessor, or else the smallest."""
    hopper, multiprocessors = _gpu(x.device)
    sizes = (*fisher.shape, *x.stride()[:2], *dy.stride()[:2])
    # what Triton looks at before it merges loads into 16-byte ones
    aligned = not any(size % 16 for size in (*sizes, x.data_ptr(), dy.data_ptr()))
    # before Hopper, 64 tokens at a time would take more registers than there are
    choices = tiles(x.dtype, aligned, block_t=64 if hopper and x.shape[1] > 32 else 32)
    return next((tile for tile in choices if _programs(fisher, tile) >= multiprocessors), choices[-1])


def launch(
    fisher: Tensor, x: Tensor, dy: Tensor, sample_weight: Tensor | None, tile: Tile, squared: bool = False
) -> None:
    """Launch the kernel with one tile; x and dy [N, T, features] with contiguous features, N and T at least 1."""
    with torch.cuda.device_of(fisher):
        _fisher_linear_kernel[(_programs(fisher, tile),)](
            fisher,
            x,
            dy,
            sample_weight,
            x.shape[0],
            x.shape[1],
            *fisher.shape,
            *fisher.stride(),
            *x.stride()[:2],
            *dy.stride()[:2],
            BLOCK_O=tile.block_o,
            BLOCK_I=tile.block_i,
            BLOCK_T=tile.block_t,
            GROUP_O=_GROUP_O,
            SQUARED=squared,
            # the interpreter's tl.dot multiplies the bit patterns of bf16 numbers
            UPCAST=triton.knobs.runtime.interpret and x.dtype == torch.bfloat16,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )


def _programs(fisher: Tensor, tile: Tile) -> int:
    return triton.cdiv(fisher.shape[0], tile.block_o) * triton.cdiv(fisher.shape[1], tile.block_i)


@functools.lru_cache
def _gpu(device: torch.device) -> tuple[bool, int]:
    if device.type != "cuda":  # the interpreter: any answer gives the same numbers
        return True, 132
    properties = torch.cuda.get_device_properties(device)
    # consumer chips after Hopper (compute capability 12) have Ampere's tensor core instructions
    return properties.major in (9, 10), properties.multi_processor_count


def _check(fisher: Tensor, x: Tensor, dy: Tensor, sample_weight: Tensor | None) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or dy.dtype != x.dtype:
        raise TypeError(f"x and dy must both be fp32, bf16 or fp16, got {x.dtype} and {dy.dtype}; cast them first")
    if fisher.dtype != torch.float32:
        raise TypeError(f"fisher must be float32, got {fisher.dtype}; squares of gradients underflow in less")
    if x.dim() != 3 or dy.dim() != 3 or x.shape[:2] != dy.shape[:2]:
        raise ValueError(f"x and dy must be [N, T, I] and [N, T, O], got {tuple(x.shape)} and {tuple(dy.shape)}")
    if fisher.shape != (dy.shape[2], x.shape[2]):
        raise ValueError(f"fisher must be [O, I] = {(dy.shape[2], x.shape[2])}, got {tuple(fisher.shape)}")
    if sample_weight is not None and (
        sample_weight.dtype != torch.float32 or sample_weight.shape != x.shape[:1] or not sample_weight.is_contiguous()
    ):
        raise ValueError(
            f"sample_weight must be contiguous float32 [N] = [{x.shape[0]}], got {sample_weight.dtype} "
            f"{tuple(sample_weight.shape)}"
        )
    for name, tensor in (("x", x), ("dy", dy), ("sample_weight", sample_weight)):
        if tensor is not None and tensor.device != fisher.device:
            raise ValueError(f"{name} must be on fisher's device {fisher.device}, got {tensor.device}; move it there")
