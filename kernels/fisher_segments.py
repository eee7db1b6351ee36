"""Sum over segments of rows of squared weight gradients, into one slab or into that of each segment's group."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseft.kernels import tiles
from sparseft.kernels.fisher_tile import tile_position


@triton.jit
def _fisher_segments_kernel(
    fisher,
    x,
    dy,
    weight,
    blocks,
    group_starts,
    out_features,
    in_features,
    fisher_stride_g,
    fisher_stride_o,
    fisher_stride_i,
    x_stride_m,
    dy_stride_m,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP_O: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program owns one tile of one slab for all segments of its group: no atomics, the same bits every time.

    blocks: int32 [B + 1, 3], the first row of a block of rows, how many rows it has, and its segment if it is that
    segment's last block, else -1; group after group. group_starts: int32 [G + 1]. UPCAST: multiply in fp32, for the
    interpreter.
    """
    group = tl.program_id(1)
    tile_o, tile_i = tile_position(tl.program_id(0), out_features, in_features, BLOCK_O, BLOCK_I, GROUP_O)
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    t = tl.arange(0, BLOCK_T)
    inside_o, inside_i = o < out_features, i < in_features
    dy_tile = dy + t[:, None].to(tl.int64) * dy_stride_m + o[None, :]
    x_tile = x + t[:, None].to(tl.int64) * x_stride_m + i[None, :]
    begin, end = tl.load(group_starts + group), tl.load(group_starts + group + 1)
    grad = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    # One loop over the blocks of all segments. The table's entry for a block is loaded an iteration ahead: loaded
    # where it is used, it would wait for all the loads of x and dy in flight.
    entry = blocks + begin * 3
    row, rows, segment = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    for _ in tl.range(begin, end):
        present = (t < rows)[:, None]
        first = row.to(tl.int64)
        dy_block = tl.load(dy_tile + first * dy_stride_m, mask=present & inside_o[None, :], other=0.0)
        x_block = tl.load(x_tile + first * x_stride_m, mask=present & inside_i[None, :], other=0.0)
        if UPCAST:
            dy_block, x_block = dy_block.to(tl.float32), x_block.to(tl.float32)
        grad = tl.dot(tl.trans(dy_block), x_block, grad, input_precision="ieee")
        if segment >= 0:
            squared = grad * grad
            if weight is not None:
                squared *= tl.load(weight + segment)
            total += squared
            grad = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        entry += 3
        row, rows, segment = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    if begin < end:
        slab = fisher + group.to(tl.int64) * fisher_stride_g
        address = slab + o[:, None].to(tl.int64) * fisher_stride_o + i[None, :].to(tl.int64) * fisher_stride_i
        inside = inside_o[:, None] & inside_i[None, :]
        tl.store(address, tl.load(address, mask=inside, other=0.0) + total, mask=inside)


def fisher_segments_(
    fisher: Tensor,
    x: Tensor,
    dy: Tensor,
    offsets: Tensor,
    groups: Tensor | None = None,
    weight: Tensor | None = None,
) -> None:
    """Add `w_s * (sum over the rows m of segment s of dy[m,:] outer x[m,:])**2` to the Fisher slab of its group.

    fisher: fp32 [O, I], or [G, O, I] with groups; x: [M, I]; dy: [M, O], same dtype as x (fp32, bf16, fp16); offsets:
    int64 [S + 1], ascending, segment s holds the rows offsets[s] .. offsets[s + 1] - 1; groups: int64 [S], the slab of
    a segment; weight: fp32 [S] or None for ones. Accumulates in fp32; fp32 inputs are multiplied in fp32. Nothing
    waits for the GPU; offsets and groups that are out of range stop it with a device-side assertion.
    Source: FISH Mask, arXiv 2111.09839, equation 4, for one layer whose rows belong to samples and experts.
    """
    slabs = fisher.unsqueeze(0) if groups is None and fisher.dim() == 2 else fisher
    _check(slabs, x, dy, offsets, groups, weight)
    if not (fisher.numel() and x.shape[0] and offsets.numel() > 1):
        return
    _check_values(offsets, x.shape[0], groups, slabs.shape[0])
    x, dy = (tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in (x, dy))
    launch(slabs, x, dy, offsets, groups, weight, choose_tile(slabs, x, dy, offsets.numel() - 1))


def choose_tile(slabs: Tensor, x: Tensor, dy: Tensor, segments: int) -> tiles.Tile:
    """Return the largest tile of which there is one for every multiprocessor, or else the smallest."""
    hopper, multiprocessors = tiles.gpu(x.device)
    # the rows of a segment beyond a multiple of this are multiplied as zeros
    rows = x.shape[0] // segments
    block_t = 16 if rows <= 16 else 32 if rows <= 32 or not hopper else 64
    choices = tiles.available(x.dtype, tiles.aligned(x[None], dy[None]), block_t)
    enough = (tile for tile in choices if slabs.shape[0] * tile.programs(*slabs.shape[1:]) >= multiprocessors)
    return next(enough, choices[-1])


def launch(
    slabs: Tensor,
    x: Tensor,
    dy: Tensor,
    offsets: Tensor,
    groups: Tensor | None,
    weight: Tensor | None,
    tile: tiles.Tile,
) -> None:
    """Launch the kernel with one tile; slabs [G, O, I]; x and dy [M, features], features contiguous; M and S >= 1."""
    blocks, group_starts = block_table(offsets, groups, slabs.shape[0], x.shape[0], tile.block_t)
    with torch.cuda.device_of(slabs):
        _fisher_segments_kernel[(tile.programs(*slabs.shape[1:]), slabs.shape[0])](
            slabs,
            x,
            dy,
            weight,
            blocks,
            group_starts,
            *slabs.shape[1:],
            *slabs.stride(),
            x.stride(0),
            dy.stride(0),
            **tiles.constants(x, tile),
        )


def block_table(
    offsets: Tensor, groups: Tensor | None, n_groups: int, rows: int, block_t: int
) -> tuple[Tensor, Tensor]:
    """Return the kernel's `blocks` and `group_starts`, made on the device without waiting for it.

    How many blocks there are is known there only, so the table is as long as it may have to be, and one entry longer.
    """
    begins, lengths = offsets[:-1], offsets.diff()
    segments, device = len(begins), offsets.device
    if groups is None:
        groups, order = torch.zeros_like(begins), torch.arange(segments, device=device)
    else:
        groups, order = groups.sort(stable=True)
        begins, lengths = begins[order], lengths[order]
    counts = (lengths + block_t - 1) // block_t
    ends = counts.cumsum(0)
    block = torch.arange(rows // block_t + segments + 1, device=device)
    position = torch.searchsorted(ends, block, right=True).clamp_(max=segments - 1)
    done = (block - (ends - counts)[position]) * block_t
    left = lengths[position] - done
    closes = torch.where(left <= block_t, order[position], -1)
    blocks = torch.stack([begins[position] + done, left.clamp(0, block_t), closes], 1).int()
    first = torch.searchsorted(groups, torch.arange(n_groups + 1, device=device))
    return blocks, torch.cat([ends.new_zeros(1), ends])[first].int()


def _check(
    slabs: Tensor, x: Tensor, dy: Tensor, offsets: Tensor, groups: Tensor | None, weight: Tensor | None
) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or dy.dtype != x.dtype:
        raise TypeError(f"x and dy must both be fp32, bf16 or fp16, got {x.dtype} and {dy.dtype}; cast them first")
    if slabs.dtype != torch.float32:
        raise TypeError(f"fisher must be float32, got {slabs.dtype}; squares of gradients underflow in less")
    if x.dim() != 2 or dy.dim() != 2 or len(x) != len(dy):
        raise ValueError(f"x and dy must be [M, I] and [M, O], got {tuple(x.shape)} and {tuple(dy.shape)}")
    if len(x) >= 2**31:
        raise ValueError(f"x must have fewer than 2^31 rows, got {len(x)}; call once for each part of the segments")
    if slabs.dim() != 3 or slabs.shape[1:] != (dy.shape[1], x.shape[1]):
        raise ValueError(
            f"fisher must be [O, I] without groups and [G, O, I] with them, O, I = {(dy.shape[1], x.shape[1])}, got "
            f"[G, O, I] = {tuple(slabs.shape)}"
        )
    if groups is None and len(slabs) != 1:
        raise ValueError(f"groups must say which of the {len(slabs)} slabs of fisher a segment belongs to, got None")
    if len(slabs) >= 2**16:
        raise ValueError(f"fisher must have fewer than 65536 slabs, got {len(slabs)}; call once for some of them")
    if offsets.dtype != torch.int64 or offsets.dim() != 1 or not len(offsets):
        raise ValueError(f"offsets must be int64 [S + 1], got {offsets.dtype} {tuple(offsets.shape)}")
    for name, tensor, dtype in (("groups", groups, torch.int64), ("weight", weight, torch.float32)):
        if tensor is not None and (
            tensor.dtype != dtype or tensor.shape != (len(offsets) - 1,) or not tensor.is_contiguous()
        ):
            raise ValueError(
                f"{name} must be contiguous {dtype} [S] = [{len(offsets) - 1}], got {tensor.dtype} "
                f"{tuple(tensor.shape)}"
            )
    for name, tensor in (("x", x), ("dy", dy), ("offsets", offsets), ("groups", groups), ("weight", weight)):
        if tensor is not None and tensor.device != slabs.device:
            raise ValueError(f"{name} must be on fisher's device {slabs.device}, got {tensor.device}; move it there")


def _check_values(offsets: Tensor, rows: int, groups: Tensor | None, n_groups: int) -> None:
    within = (offsets.diff() >= 0).all() & (offsets[0] >= 0) & (offsets[-1] <= rows)
    if groups is not None:
        within &= (groups >= 0).all() & (groups < n_groups).all()
    torch._assert_async(within, f"offsets must ascend within the {rows} rows of x, groups be below {n_groups}")
