"""The weight gradient of a Linear at chosen entries: tiles of it are multiplied in registers, their entries leave.

On tensor cores a tile of the dense product costs less than loading a row of `dy` and one of `x` for each of its chosen
entries: above a density of about 0.3 %, as an estimate by bytes. What is left is to pick entries out of registers. The
tile goes through shared memory, where the blocks of x and dy are no longer needed, and entries are read from there
(`tl.gather`): 4 bytes an element of the tile, once for every BLOCK_E entries in its fullest row. Against it stood a
scratch tile in global memory, the same bytes at a fraction of the rate and a barrier of its own, and products with
one-hot matrices, which in exact fp32 would have to do without tensor cores.

Index lists are sorted, so the entries of a tile are a run in each of its rows. Where a run begins and ends is searched
for in the packed list, which says how many entries lie before each block of 8,192 elements: among a block's entries
two or three steps are enough. A table of where runs begin would take half as much memory as the list itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sparseft.index_lists import BLOCK, PACKED, count, pack
from sparseft.kernels import tiles
from sparseft.kernels.checks import check_indices
from sparseft.kernels.fisher_tile import tile_position
from sparseft.kernels.index_lists import load_columns, lower_bound
from sparseft.kernels.multi_tensor import FLOATS

_BLOCK_I = 256
_BLOCK_E = 16
# what a program costs beside its products, in tokens: filling the pipeline, picking entries
_OVERHEAD = 128
_MOST_SPLITS = 8


@triton.jit
def _product(
    x,
    dy,
    first,
    end,
    origin,
    sizes,
    strides,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return the tile of dy.T @ x that begins at `origin`, over tokens first..end: fp32 [BLOCK_O, BLOCK_I].

    strides: of x and dy over tokens, or None where both are descriptors, which know them.
    """
    first_o, first_i = origin
    t = tl.arange(0, BLOCK_T)
    grad = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    if strides is not None:
        out_features, in_features = sizes
        x_stride, dy_stride = strides
        block = tl.full((), BLOCK_T, tl.int64)
        o, i = first_o + tl.arange(0, BLOCK_O), first_i + tl.arange(0, BLOCK_I)
        dy_tile = dy + (first + t)[:, None].to(tl.int64) * dy_stride + o[None, :]
        x_tile = x + (first + t)[:, None].to(tl.int64) * x_stride + i[None, :]
        inside_o, inside_i = (o < out_features)[None, :], (i < in_features)[None, :]
    for token in tl.range(first, end, BLOCK_T):
        if strides is None:
            dy_block, x_block = dy.load([token, first_o]), x.load([token, first_i])
        else:
            present = (t < end - token)[:, None]
            dy_block = tl.load(dy_tile, mask=present & inside_o, other=0.0)
            x_block = tl.load(x_tile, mask=present & inside_i, other=0.0)
            dy_tile += block * dy_stride
            x_tile += block * x_stride
        if UPCAST:
            dy_block, x_block = dy_block.to(tl.float32), x_block.to(tl.float32)
        grad = tl.dot(tl.trans(dy_block), x_block, grad, input_precision="ieee")
    return grad


# batches and layers differ in these; compiling for their values would stall training
@triton.jit(do_not_specialize=["k", "blocks", "n_tokens", "split_tokens"])
def _selected_grad_kernel(
    out,
    x,
    dy,
    x_descriptor,
    dy_descriptor,
    indices,
    blocks,
    k,
    n_tokens,
    split_tokens,
    out_features,
    in_features,
    x_stride,
    dy_stride,
    ADD: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP_O: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program multiplies one tile over the tokens of one split and writes, or adds, its entries to out[split]."""
    tile_o, tile_i = tile_position(tl.program_id(0), out_features, in_features, BLOCK_O, BLOCK_I, GROUP_O)
    split = tl.program_id(1)
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    start = o.to(tl.int64) * in_features + tile_i * BLOCK_I
    width = tl.minimum(in_features - tile_i * BLOCK_I, BLOCK_I)
    # both ends of all rows at a time; those of rows past the last one are the list's end
    ends = lower_bound(indices, blocks, (start[:, None] + tl.arange(0, 2)[None, :] * width).reshape(2 * BLOCK_O))
    begin, end = tl.split(ends.reshape(BLOCK_O, 2))
    longest = tl.max(end - begin)
    if longest > 0:
        first_token = split * split_tokens
        last_token = tl.minimum(first_token + split_tokens, n_tokens)
        origin, sizes = (tile_o * BLOCK_O, tile_i * BLOCK_I), (out_features, in_features)
        if dy_descriptor is None:
            grad = _product(x, dy, first_token, last_token, origin, sizes, (x_stride, dy_stride),
                            BLOCK_O, BLOCK_I, BLOCK_T, UPCAST)  # fmt: skip
        else:
            grad = _product(x_descriptor, dy_descriptor, first_token, last_token, origin, sizes, None,
                            BLOCK_O, BLOCK_I, BLOCK_T, UPCAST)  # fmt: skip
        out += split.to(tl.int64) * k
        for number in range(0, longest, BLOCK_E):
            entry = begin[:, None] + number + tl.arange(0, BLOCK_E)[None, :]
            exists = entry < end[:, None]
            column = load_columns(indices, blocks, entry, exists, start[:, None])
            # in one dimension, because along the rows of two it becomes shuffles between threads, which spill
            place = tl.arange(0, BLOCK_O)[:, None] * BLOCK_I + column
            value = tl.gather(grad.reshape(BLOCK_O * BLOCK_I), place.reshape(BLOCK_O * BLOCK_E), 0)
            value = value.reshape(BLOCK_O, BLOCK_E)
            if ADD:
                value += tl.load(out + entry, mask=exists, other=0.0)
            tl.store(out + entry, value, mask=exists)


def selected_grad_(grad: Tensor, x: Tensor, dy: Tensor, indices: Tensor) -> None:
    """Add `sum_m dy[m, row_j] * x[m, column_j]` to grad[j], the gradient of a Linear weight [O, I] at entry j.

    grad: contiguous fp32 [k]; x: [M, I]; dy: [M, O], same dtype as x (fp32, bf16, fp16); indices: the list of the k
    positions row_j * I + column_j, packed anew in every call unless it is packed. What it holds is not checked: that
    would wait for the GPU. Accumulates in fp32; fp32 inputs are multiplied in fp32, never in TF32. Where features are
    not contiguous, a copy is made. No atomics: the same bits every time.
    """
    indices = indices.contiguous()
    _check(grad, x, dy, indices)
    if not (grad.numel() and x.shape[0]):
        return
    x, dy = (tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in (x, dy))
    if indices.dtype != PACKED:
        indices = pack(indices, dy.shape[1] * x.shape[1])
    tile = choose_tile(x, dy)
    launch(grad, x, dy, indices, tile, choose_splits(x, dy, tile))


def choose_tile(x: Tensor, dy: Tensor) -> tiles.Tile:
    """Return the tile that suits the inputs and the GPU."""
    if x.dtype == torch.float32:
        return tiles.Tile(32, _BLOCK_I, 16, 8, 3)
    hopper, _ = tiles.gpu(x.device)
    if not tiles.aligned(x[None], dy[None]):
        return tiles.Tile(64, _BLOCK_I, 32, 8, 3)
    return tiles.Tile(128, _BLOCK_I, 64, 8, 3) if hopper else tiles.Tile(64, _BLOCK_I, 32, 8, 3)


def choose_splits(x: Tensor, dy: Tensor, tile: tiles.Tile) -> int:
    """Return into how many parts the tokens go, so that a small weight occupies all multiprocessors."""
    _, multiprocessors = tiles.gpu(x.device)
    programs = tile.programs(dy.shape[1], x.shape[1])

    def cost(splits: int) -> float:
        rounds = triton.cdiv(programs * splits, multiprocessors)
        return rounds * (x.shape[0] / splits + _OVERHEAD)

    return min(range(1, _MOST_SPLITS + 1), key=cost)


def launch(grad: Tensor, x: Tensor, dy: Tensor, indices: Tensor, tile: tiles.Tile, splits: int) -> None:
    """Launch the kernel with one tile; x and dy [M, features] with contiguous features, M and k at least 1.

    indices: a packed list.
    """
    n_tokens = x.shape[0]
    split_tokens = triton.cdiv(triton.cdiv(n_tokens, tile.block_t), splits) * tile.block_t
    splits = triton.cdiv(n_tokens, split_tokens)
    out = grad if splits == 1 else grad.new_empty(splits, grad.numel())
    descriptors = (None, None)
    if tiles.has_descriptors(x[None], dy[None]):
        descriptors = (_descriptor(x, tile.block_t, tile.block_i), _descriptor(dy, tile.block_t, tile.block_o))
    constants = tiles.constants(x, tile)
    if x.dtype == torch.float32:
        constants["maxnreg"] = 128  # two programs a multiprocessor; left alone, the assembler spills to make it three
    with torch.cuda.device_of(grad):
        _selected_grad_kernel[(tile.programs(dy.shape[1], x.shape[1]), splits)](
            out,
            x,
            dy,
            *descriptors,
            indices,
            triton.cdiv(dy.shape[1] * x.shape[1], BLOCK),
            grad.numel(),
            n_tokens,
            split_tokens,
            dy.shape[1],
            x.shape[1],
            x.stride(0),
            dy.stride(0),
            ADD=splits == 1,
            BLOCK_E=_BLOCK_E,
            **constants,
        )
    if splits > 1:
        grad += out.sum(0)


def _descriptor(tensor: Tensor, block_t: int, block_features: int) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [block_t, block_features])


def _check(grad: Tensor, x: Tensor, dy: Tensor, indices: Tensor) -> None:
    if x.dtype not in FLOATS or dy.dtype != x.dtype:
        raise TypeError(f"x and dy must both be fp32, bf16 or fp16, got {x.dtype} and {dy.dtype}; cast them first")
    if x.dim() != 2 or dy.dim() != 2 or len(x) != len(dy):
        raise ValueError(f"x and dy must be [M, I] and [M, O], got {tuple(x.shape)} and {tuple(dy.shape)}")
    numel = dy.shape[1] * x.shape[1]
    check_indices("indices", indices, numel, grad.device)
    k = count(indices, numel)
    if len(x) >= 2**31 or k >= 2**31:
        raise ValueError(f"x and indices must be shorter than 2^31, got {len(x)} and {k}; call once for each part")
    if grad.dtype != torch.float32:
        raise TypeError(f"grad must be float32, got {grad.dtype}; sums of many uses and batches are lost in less")
    if grad.shape != (k,) or not grad.is_contiguous():
        raise ValueError(f"grad must be contiguous [k] = ({k},), got {tuple(grad.shape)}")
    for name, tensor in (("x", x), ("dy", dy)):
        if tensor.device != grad.device:
            raise ValueError(f"{name} must be on grad's device {grad.device}, got {tensor.device}; move it there")
