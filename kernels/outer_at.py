"""Per-sample gradients of a Linear weight at chosen entries: a dot product over tokens an entry, and no matrix."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseft.kernels.multi_tensor import FLOATS, POSITIONS

_BLOCK_K = 32


# k differs from layer to layer and decides nothing; the number of tokens decides whether loads are merged
@triton.jit(do_not_specialize=["k"])
def _outer_at_kernel(
    out,
    left,
    right,
    indices,
    k,
    n_tokens,
    left_features,
    right_features,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program computes BLOCK_K entries of one sample. left: [N, A, T], right: [N, B, T]: tokens lie together."""
    blocks = tl.cdiv(k, BLOCK_K)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    entry = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    exists = entry < k
    index = tl.load(indices + entry, mask=exists, other=0)
    row = index // right_features
    column = index - row * right_features
    t = tl.arange(0, BLOCK_T)
    left_tokens = left + (n * left_features + row)[:, None].to(tl.int64) * n_tokens + t[None, :]
    right_tokens = right + (n * right_features + column)[:, None].to(tl.int64) * n_tokens + t[None, :]
    sums = tl.zeros((BLOCK_K, BLOCK_T), tl.float32)
    for first in tl.range(0, n_tokens, BLOCK_T):
        present = exists[:, None] & (t < n_tokens - first)[None, :]
        left_block = tl.load(left_tokens + first, mask=present, other=0.0).to(tl.float32)
        right_block = tl.load(right_tokens + first, mask=present, other=0.0).to(tl.float32)
        sums += left_block * right_block
    tl.store(out + n * k + entry, tl.sum(sums, 1), mask=exists)


def outer_at(left: Tensor, right: Tensor, indices: Tensor) -> Tensor:
    """Return `sum_t left[n, t, a_j] * right[n, t, b_j]` for every sample n and chosen entry j: fp32 [N, k].

    left: [N, T, A]; right: [N, T, B], of one dtype, fp32, bf16 or fp16, any strides; indices: int32 or int64 [k], flat
    positions a_j * B + b_j, sorted and unique. Copies are made in which the tokens of a feature lie together, unless
    they do: a load would otherwise fetch a sector of memory for each number.
    """
    _check(left, right, indices)
    samples, tokens, left_features = left.shape
    k = indices.numel()
    out = left.new_empty(samples, k, dtype=torch.float32)
    if not out.numel():
        return out
    if not tokens:
        return out.zero_()
    block_t = 16 if tokens <= 16 else 32
    with torch.cuda.device_of(left) if left.is_cuda else contextlib.nullcontext():
        _outer_at_kernel[(triton.cdiv(k, _BLOCK_K) * samples,)](
            out,
            left.transpose(1, 2).contiguous(),
            right.transpose(1, 2).contiguous(),
            indices.contiguous(),
            k,
            tokens,
            left_features,
            right.shape[2],
            BLOCK_K=_BLOCK_K,
            BLOCK_T=block_t,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out


def _check(left: Tensor, right: Tensor, indices: Tensor) -> None:
    if left.dtype not in FLOATS or right.dtype != left.dtype:
        raise TypeError(
            f"left and right must both be fp32, bf16 or fp16, got {left.dtype} and {right.dtype}; cast them first"
        )
    if left.dim() != 3 or right.dim() != 3 or left.shape[:2] != right.shape[:2]:
        raise ValueError(
            f"left and right must be [N, T, A] and [N, T, B], got {tuple(left.shape)} and {tuple(right.shape)}"
        )
    if indices.dtype not in POSITIONS or indices.dim() != 1:
        raise TypeError(f"indices must be int32 or int64 [k], got {indices.dtype} {tuple(indices.shape)}")
    for name, tensor in (("right", right), ("indices", indices)):
        if tensor.device != left.device:
            raise ValueError(f"{name} must be on left's device {left.device}, got {tensor.device}; move it there")
