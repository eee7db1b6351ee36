"""Exact top-k over many tensors that are never concatenated: a radix select over the bits of the scores.

Scores become 32-bit integers of the same order. A histogram of their upper halves says in which bin the k-th largest
lies; a second one, of the lower halves in that bin, says which number it is. A third pass counts for every chunk the
scores above it and the ties; their running sums say where a chunk's positions go, and a fourth pass writes them there.
The only atomics add integers, so the order of programs changes nothing.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseft.kernels.multi_tensor import find_chunk, make_table, pointer

_CHUNK = 4096
_BINS = 1 << 16
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
# histograms side by side, or equal scores (zeros, of embedding rows never seen) would all queue for one counter
_COPIES = 8
# the outermost bins on either side: where the exponent is all ones
_NON_FINITE_BINS = 128
# read from the table, so that one launch serves scores of several dtypes
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@triton.jit
def _load_keys(table, CHUNK: tl.constexpr):
    """Return this program's row and elements, their scores as int32 of the same order, and which of them exist.

    Columns of the table: number of scores, scores, code of their dtype, number of the tensor.
    """
    row, element, exists = find_chunk(table, CHUNK)
    code = tl.load(row + 2)
    if code == 0:
        score = tl.load(pointer(row, 1, tl.float32) + element, mask=exists, other=0.0)
    elif code == 1:
        score = tl.load(pointer(row, 1, tl.bfloat16) + element, mask=exists, other=0.0).to(tl.float32)
    else:
        score = tl.load(pointer(row, 1, tl.float16) + element, mask=exists, other=0.0).to(tl.float32)
    bits = score.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # of two negative numbers the one of larger magnitude is less; -0.0 is no negative number
    return row, element, tl.where((bits < 0) & (magnitude > 0), -1 - magnitude, magnitude), exists


@triton.jit
def _histogram_kernel(
    table, histogram, upper_bin, UPPER: tl.constexpr, BINS: tl.constexpr, COPIES: tl.constexpr, CHUNK: tl.constexpr
):
    """Count the upper halves of all keys, or the lower halves of the keys whose upper half is `upper_bin`."""
    _, _, key, counted = _load_keys(table, CHUNK)
    upper = (key >> 16) + BINS // 2
    if UPPER:
        half = upper
    else:
        half = key & (BINS - 1)
        counted = counted & (upper == tl.load(upper_bin))
    copy = tl.program_id(0) % COPIES
    tl.atomic_add(histogram + copy * BINS + half, counted.to(tl.int32), mask=counted, sem="relaxed")


@triton.jit
def _count_kernel(table, threshold, counts, CHUNK: tl.constexpr):
    """Write how many of the program's keys lie above the threshold, and how many on it."""
    _, _, key, exists = _load_keys(table, CHUNK)
    limit = tl.load(threshold)
    mine = counts + tl.program_id(0).to(tl.int64) * 2
    tl.store(mine, tl.sum((exists & (key > limit)).to(tl.int32)))
    tl.store(mine + 1, tl.sum((exists & (key == limit)).to(tl.int32)))


@triton.jit
def _topk_indices_kernel(table, threshold, ties_wanted, counts_before, indices, counts, CHUNK: tl.constexpr):
    """Write the positions of all keys above the threshold and of the first ties, in order, and count them."""
    row, element, key, exists = _load_keys(table, CHUNK)
    limit, wanted = tl.load(threshold), tl.load(ties_wanted)
    before = counts_before + tl.program_id(0).to(tl.int64) * 2
    above_before, ties_before = tl.load(before), tl.load(before + 1)
    tie = exists & (key == limit)
    tie_rank = ties_before + tl.cumsum(tie.to(tl.int32))
    chosen = (exists & (key > limit)) | (tie & (tie_rank <= wanted))
    rank = tl.cumsum(chosen.to(tl.int32))
    tl.store(indices + above_before + tl.minimum(ties_before, wanted) + rank - 1, element, mask=chosen)
    tl.atomic_add(counts + tl.load(row + 3), tl.sum(chosen.to(tl.int64)), sem="relaxed")


def topk_indices(scores: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Return where the k largest of all scores are, exactly k of them, ties going to the lowest (tensor, index).

    scores: fp32, bf16 or fp16 tensors of any shape, finite; one that is not contiguous is copied. Returns `indices`
    [k], the positions inside each tensor, tensor after tensor, ascending (int32, or int64 if any tensor has 2^31
    elements or more), and `counts`, int64 [len(scores)], how many belong to each tensor. Waits for the GPU once, to
    learn whether all scores are finite.
    """
    _check(scores, k)
    device, flat = scores[0].device, [score.contiguous() for score in scores]
    rows = tuple(
        (score.numel(), score.data_ptr(), _DTYPE_CODES[score.dtype], number) for number, score in enumerate(flat)
    )
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        table, programs = make_table(rows, _CHUNK, device)
        threshold, ties_wanted = _threshold(table, programs, k)
        counts = torch.empty(programs, 2, dtype=torch.int32, device=device)
        _count_kernel[(programs,)](table, threshold, counts, CHUNK=_CHUNK, **_OPTIONS)
        counts_before = counts.cumsum(0) - counts
        index_dtype = torch.int32 if max(score.numel() for score in scores) < 2**31 else torch.int64
        indices = torch.empty(k, dtype=index_dtype, device=device)
        counts = torch.zeros(len(scores), dtype=torch.int64, device=device)
        _topk_indices_kernel[(programs,)](
            table, threshold, ties_wanted, counts_before, indices, counts, CHUNK=_CHUNK, **_OPTIONS
        )
    return indices, counts


def _threshold(table: Tensor, programs: int, k: int) -> tuple[Tensor, Tensor]:
    """Return the k-th largest key, int32 [1], and how many of the keys equal to it are among the k, int64 [1]."""
    rank = torch.full((1,), k, dtype=torch.int64, device=table.device)
    upper_counts = _histogram(table, programs, rank, UPPER=True)
    bad = int(upper_counts[:_NON_FINITE_BINS].sum() + upper_counts[-_NON_FINITE_BINS:].sum())
    if bad:
        raise ValueError(f"scores must be finite, got {bad} NaN or infinite values; drop the samples that caused them")
    upper, rank = _bin_of(upper_counts, rank)
    lower, rank = _bin_of(_histogram(table, programs, upper, UPPER=False), rank)
    return ((upper - _BINS // 2) * _BINS + lower).to(torch.int32), rank


def _histogram(table: Tensor, programs: int, upper_bin: Tensor, UPPER: bool) -> Tensor:
    histogram = torch.zeros(_COPIES, _BINS, dtype=torch.int32, device=table.device)
    _histogram_kernel[(programs,)](
        table, histogram, upper_bin, UPPER=UPPER, BINS=_BINS, COPIES=_COPIES, CHUNK=_CHUNK, **_OPTIONS
    )
    return histogram.sum(0)


def _bin_of(counts: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bin in which the rank-th largest lies, and its rank there, both int64 [1] on the device."""
    reached = counts.flip(0).cumsum(0)
    above = reached < rank
    return _BINS - 1 - above.sum(0, keepdim=True), rank - (reached * above).amax(0, keepdim=True)


def _check(scores: list[Tensor], k: int) -> None:
    if not scores:
        raise ValueError("scores must hold at least one tensor, got none; is every parameter excluded?")
    for i, score in enumerate(scores):
        if score.dtype not in _DTYPE_CODES:
            raise TypeError(f"scores[{i}] must be float32, bfloat16 or float16, got {score.dtype}; cast it first")
        if score.device != scores[0].device:
            raise ValueError(f"scores[{i}] must be on {scores[0].device}, got {score.device}; move it there")
    total = sum(score.numel() for score in scores)
    if not 0 <= k <= total:
        raise ValueError(f"k must be from 0 to the number of scores, {total}, got {k}; choose a density in (0, 1]")
