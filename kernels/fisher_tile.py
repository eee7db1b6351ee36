"""One tile of a Linear's Fisher diagonal, for all samples: what the kernels for one layer and for many share."""

from __future__ import annotations

import triton
import triton.language as tl

# samples whose blocks are counted at a time
_COUNTED = tl.constexpr(128)


@triton.jit
def tile_position(
    tile, out_features, in_features, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, GROUP_O: tl.constexpr
):
    """Return the row and the column of a tile, in tiles."""
    tiles_o, tiles_i = tl.cdiv(out_features, BLOCK_O), tl.cdiv(in_features, BLOCK_I)
    first_o = tile // (GROUP_O * tiles_i) * GROUP_O
    group_o = tl.minimum(tiles_o - first_o, GROUP_O)
    within = tile % (GROUP_O * tiles_i)
    return first_o + within % group_o, within // group_o


@triton.jit
def widen_span(span, dy, first, n_tokens, out_features, dy_stride_t, TOKENS: tl.constexpr, FEATURES: tl.constexpr):
    """Widen the span of a sample to hold those of TOKENS tokens from `first` on whose row of dy is not zero.

    span: int32 [2], how many tokens there are from the first such token to the end of the sample, and how many from
    its beginning to the last one; zeros before the first call. Largest integers do not depend on the order of calls.
    """
    t = first + tl.arange(0, TOKENS)
    f = tl.arange(0, FEATURES)
    rows = dy + t[:, None].to(tl.int64) * dy_stride_t + f[None, :]
    exists = t < n_tokens
    nonzero = (t >= n_tokens).to(tl.int32)
    column = 0
    # outside of padding the first features decide
    while (column < out_features) & (tl.min(nonzero) == 0):
        block = tl.load(rows + column, mask=exists[:, None] & (f < out_features - column)[None, :], other=0.0)
        nonzero = nonzero | tl.max((block.to(tl.float32) != 0).to(tl.int32), axis=1)
        column += FEATURES
    counts = exists & (nonzero != 0)
    end = tl.max(tl.where(counts, t + 1, 0))
    if end > 0:
        tl.atomic_max(span, tl.max(tl.where(counts, n_tokens - t, 0)), sem="relaxed")
        tl.atomic_max(span + 1, end, sem="relaxed")


@triton.jit
def _span(spans, n, n_samples, n_tokens):
    at = spans + 2 * tl.minimum(n, n_samples - 1)
    return n_tokens - tl.load(at), tl.load(at + 1)


@triton.jit
def _blocks(spans, n_samples, n_tokens, BLOCK_T: tl.constexpr):
    """Return the number of blocks of tokens of all samples, at least one a sample, and of those that cut padding."""
    blocks, cut = 0, 0
    for start in range(0, n_samples, _COUNTED):
        n = start + tl.arange(0, _COUNTED)
        first, end = _span(spans, n, n_samples, n_tokens)
        blocks += tl.sum(tl.where(n < n_samples, tl.maximum(tl.cdiv(end - first, BLOCK_T), 1), 0))
        cut += tl.sum(((end < n_tokens) & ((end - first) % BLOCK_T != 0)).to(tl.int32))
    return blocks, cut


@triton.jit
def _sum_squares(
    x,
    dy,
    spans,
    sample_weight,
    partial,
    selected,
    blocks,
    origin,
    sizes,
    strides,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SQUARED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return the sum of squares of one tile. strides: None where x and dy are tensor descriptors, which know them."""
    n_samples, n_tokens, out_features, in_features = sizes
    first_o, first_i = origin
    t = tl.arange(0, BLOCK_T)
    o, i = first_o + tl.arange(0, BLOCK_O), first_i + tl.arange(0, BLOCK_I)
    inside_o, inside_i = o < out_features, i < in_features
    if strides is not None:
        x_stride_n, x_stride_t, dy_stride_n, dy_stride_t = strides
        dy_tile = dy + t[:, None].to(tl.int64) * dy_stride_t + o[None, :]
        x_tile = x + t[:, None].to(tl.int64) * x_stride_t + i[None, :]
    if selected is not None:
        address = selected + o[:, None].to(tl.int64) * in_features + i[None, :]
        counts = tl.load(address, mask=inside_o[:, None] & inside_i[None, :], other=0) != 0
    grad = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    n = 0
    first, end = _span(spans, 0, n_samples, n_tokens)
    next_first, next_end = _span(spans, 1, n_samples, n_tokens)
    # One loop over the blocks of all samples: with a loop a sample, the pipeline of loads would drain each time. What
    # steers it is loaded an iteration ahead, because within one it would wait for all loads in flight, and computed
    # outside of the branch, because no load may depend on what comes after a product.
    for _ in tl.range(0, blocks):
        if strides is None:
            dy_block = dy.load([n, first, first_o]).reshape(BLOCK_T, BLOCK_O)
            x_block = x.load([n, first, first_i]).reshape(BLOCK_T, BLOCK_I)
        else:
            n64, first64 = n.to(tl.int64), first.to(tl.int64)
            present = (t < end - first)[:, None]
            dy_block = tl.load(
                dy_tile + (n64 * dy_stride_n + first64 * dy_stride_t), mask=present & inside_o[None, :], other=0.0
            )
            x_block = tl.load(
                x_tile + (n64 * x_stride_n + first64 * x_stride_t), mask=present & inside_i[None, :], other=0.0
            )
        if UPCAST:
            dy_block, x_block = dy_block.to(tl.float32), x_block.to(tl.float32)
        grad = tl.dot(tl.trans(dy_block), x_block, grad, input_precision="ieee")
        last = first + BLOCK_T >= end
        if last:
            squared = grad if SQUARED else grad * grad
            if partial is not None:
                tl.store(partial + n, tl.sum(squared if selected is None else tl.where(counts, squared, 0.0)))
            if sample_weight is not None:
                squared *= tl.load(sample_weight + n)
            total += squared
            grad = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        first, end = tl.where(last, next_first, first + BLOCK_T), tl.where(last, next_end, end)
        n += last.to(tl.int32)
        next_first, next_end = _span(spans, n + 1, n_samples, n_tokens)
    return total


@triton.jit
def add_tile(
    fisher,
    x,
    dy,
    x_descriptor,
    dy_descriptor,
    spans,
    sample_weight,
    partial,
    selected,
    tile,
    sizes,
    fisher_strides,
    strides,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP_O: tl.constexpr,
    SQUARED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Add all samples' squared gradients to one tile of `fisher`: no atomics, the same bits every time.

    spans: int32 [N, 2], see `widen_span`; partial: fp32 [N], where the tile's sum for each sample goes, or None;
    sizes: N, T, O, I; fisher_strides: of O, I; strides: of x over N, T, and of dy. SQUARED: x and dy hold squares
    already. UPCAST: multiply in fp32, for the interpreter.
    """
    n_samples, n_tokens, out_features, in_features = sizes
    tile_o, tile_i = tile_position(tile, out_features, in_features, BLOCK_O, BLOCK_I, GROUP_O)
    origin = (tile_o * BLOCK_O, tile_i * BLOCK_I)
    blocks, cut = _blocks(spans, n_samples, n_tokens, BLOCK_T)
    if dy_descriptor is None:
        total = _sum_squares(x, dy, spans, sample_weight, partial, selected, blocks, origin, sizes, strides,
                             BLOCK_O, BLOCK_I, BLOCK_T, SQUARED, UPCAST)  # fmt: skip
    # a block that ends in padding takes pointers: a descriptor would load padding too, where x may be infinite
    elif cut > 0:
        total = _sum_squares(x, dy, spans, sample_weight, partial, selected, blocks, origin, sizes, strides,
                             BLOCK_O, BLOCK_I, BLOCK_T, SQUARED, UPCAST)  # fmt: skip
    else:
        total = _sum_squares(x_descriptor, dy_descriptor, spans, sample_weight, partial, selected, blocks, origin,
                             sizes, None, BLOCK_O, BLOCK_I, BLOCK_T, SQUARED, UPCAST)  # fmt: skip
    o, i = origin[0] + tl.arange(0, BLOCK_O), origin[1] + tl.arange(0, BLOCK_I)
    inside = (o < out_features)[:, None] & (i < in_features)[None, :]
    address = fisher + o[:, None].to(tl.int64) * fisher_strides[0] + i[None, :].to(tl.int64) * fisher_strides[1]
    tl.store(address, tl.load(address, mask=inside, other=0.0) + total, mask=inside)
