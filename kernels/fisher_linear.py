"""Sum over samples of squared per-sample weight gradients of a Linear; none of them ever leaves the registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sparseft.kernels import tiles
from sparseft.kernels.fisher_tile import add_tile, widen_span

# what a program that looks for the ends of padding reads of dy at a time
SPAN_TOKENS, SPAN_FEATURES = 16, 256


# batches differ in these two from step to step; compiling for their values would stall training
@triton.jit(do_not_specialize=["n_samples", "n_tokens"])
def _fisher_linear_kernel(
    fisher,
    x,
    dy,
    x_descriptor,
    dy_descriptor,
    spans,
    sample_weight,
    partial,
    selected,
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
    """One program owns one tile of `fisher`. partial: fp32 [tiles, N]."""
    tile = tl.program_id(0)
    if partial is not None:
        partial += tile.to(tl.int64) * n_samples
    add_tile(
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
        (n_samples, n_tokens, out_features, in_features),
        (fisher_stride_o, fisher_stride_i),
        (x_stride_n, x_stride_t, dy_stride_n, dy_stride_t),
        BLOCK_O,
        BLOCK_I,
        BLOCK_T,
        GROUP_O,
        SQUARED,
        UPCAST,
    )


@triton.jit(do_not_specialize=["n_tokens"])
def _fisher_linear_spans_kernel(
    spans, dy, n_tokens, out_features, dy_stride_n, dy_stride_t, TOKENS: tl.constexpr, FEATURES: tl.constexpr
):
    """One program reads TOKENS tokens of one sample."""
    blocks = tl.cdiv(n_tokens, TOKENS)
    n, first = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * TOKENS
    widen_span(spans + 2 * n, dy + n * dy_stride_n, first, n_tokens, out_features, dy_stride_t, TOKENS, FEATURES)


def fisher_linear_(
    fisher: Tensor,
    x: Tensor,
    dy: Tensor,
    sample_weight: Tensor | None = None,
    scores: Tensor | None = None,
    selected: Tensor | None = None,
) -> None:
    """Add `sum_n w_n * (sum_t dy[n,t,:] outer x[n,t,:])**2` to the running Fisher diagonal of a Linear weight.

    fisher: fp32 [O, I]; x: [N, T, I]; dy: [N, T, O], same dtype as x (fp32, bf16, fp16); sample_weight: fp32 [N] or
    None for ones. scores: fp32 [N], to which each sample's squares are added, unweighted, summed over the entries
    where `selected`, bool [O, I], is true, or over all. Tokens at either end of a sample whose row of dy is zero cost
    nothing and count nothing, whatever x holds there. Accumulates in fp32; fp32 inputs are multiplied in fp32, never
    in TF32, which keeps three digits. x and dy may have any strides over samples and tokens; where the features are
    not contiguous, a copy is made.
    Source: FISH Mask, arXiv 2111.09839, equation 4, for one layer.
    """
    _check(fisher, x, dy, sample_weight, scores, selected)
    if not (fisher.numel() and x.shape[0] and x.shape[1]):
        return
    squared = x.shape[1] == 1 and scores is None
    if squared:
        x, dy = squared_inputs(x, dy, sample_weight)
        sample_weight = None
    x, dy = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (x, dy))
    if selected is not None:
        selected = selected.contiguous()
    tile = tiles.choose([(x, dy)], selected is not None)
    launch(fisher, x, dy, sample_weight, tile, squared=squared, scores=scores, selected=selected)


def squared_inputs(x: Tensor, dy: Tensor, sample_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return squares of x and dy of single tokens, [N, 1, features], as the tokens of one sample, [1, N, features].

    The square of an outer product is the outer product of the squares: one product serves all samples.
    """
    # zeros of dy count nothing, also where x is infinite
    x = x.float().square().masked_fill(~dy.any(-1, keepdim=True), 0.0)
    if sample_weight is not None:
        x = x * sample_weight[:, None, None]
    return x.transpose(0, 1), dy.float().square().transpose(0, 1)


def launch(
    fisher: Tensor,
    x: Tensor,
    dy: Tensor,
    sample_weight: Tensor | None,
    tile: tiles.Tile,
    *,
    squared: bool = False,
    scores: Tensor | None = None,
    selected: Tensor | None = None,
) -> None:
    """Launch the kernels with one tile; x and dy [N, T, features] with contiguous features, N and T at least 1."""
    n_samples, n_tokens = x.shape[:2]
    programs = tile.programs(*fisher.shape)
    spans = find_spans(dy)
    partial = None if scores is None else torch.empty(programs, n_samples, device=x.device)
    descriptors = (None, None)
    if selected is None and tiles.has_descriptors(x, dy):
        descriptors = (_descriptor(x, tile.block_t, tile.block_i), _descriptor(dy, tile.block_t, tile.block_o))
    with torch.cuda.device_of(fisher):
        _fisher_linear_kernel[(programs,)](
            fisher,
            x,
            dy,
            *descriptors,
            spans,
            sample_weight,
            partial,
            selected,
            n_samples,
            n_tokens,
            *fisher.shape,
            *fisher.stride(),
            *x.stride()[:2],
            *dy.stride()[:2],
            **tiles.constants(x, tile, squared),
        )
    if scores is not None:
        scores += partial.sum(0)


def find_spans(dy: Tensor) -> Tensor:
    """Return, for each sample, how far its outermost tokens with a row of dy that is not zero are from either end.

    int32 [N, 2]: tokens from the first of them to the end, and from the beginning to the last of them. 0 without any.
    """
    n_samples, n_tokens, out_features = dy.shape
    spans = torch.zeros(n_samples, 2, dtype=torch.int32, device=dy.device)
    with torch.cuda.device_of(dy):
        _fisher_linear_spans_kernel[(n_samples * triton.cdiv(n_tokens, SPAN_TOKENS),)](
            spans,
            dy,
            n_tokens,
            out_features,
            *dy.stride()[:2],
            TOKENS=SPAN_TOKENS,
            FEATURES=SPAN_FEATURES,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return spans


def _descriptor(tensor: Tensor, block_t: int, block_features: int) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, block_t, block_features])


def _check(
    fisher: Tensor,
    x: Tensor,
    dy: Tensor,
    sample_weight: Tensor | None,
    scores: Tensor | None,
    selected: Tensor | None,
) -> None:
    check_layer(fisher, x, dy)
    for name, tensor in (("sample_weight", sample_weight), ("scores", scores)):
        if tensor is None:
            continue
        if tensor.dtype != torch.float32 or tensor.shape != x.shape[:1] or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous float32 [N] = [{x.shape[0]}], got {tensor.dtype} {tuple(tensor.shape)}"
            )
    if selected is not None:
        if scores is None:
            raise ValueError("selected restricts scores, got no scores; pass them, or leave selected out")
        if selected.dtype != torch.bool or selected.shape != fisher.shape:
            raise ValueError(
                f"selected must be bool [O, I] = {tuple(fisher.shape)}, got {selected.dtype} {tuple(selected.shape)}"
            )
    for name, tensor in (("sample_weight", sample_weight), ("scores", scores), ("selected", selected)):
        if tensor is not None and tensor.device != fisher.device:
            raise ValueError(f"{name} must be on fisher's device {fisher.device}, got {tensor.device}; move it there")


def check_layer(fisher: Tensor, x: Tensor, dy: Tensor) -> None:
    """Raise unless the three fit each other."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or dy.dtype != x.dtype:
        raise TypeError(f"x and dy must both be fp32, bf16 or fp16, got {x.dtype} and {dy.dtype}; cast them first")
    if fisher.dtype != torch.float32:
        raise TypeError(f"fisher must be float32, got {fisher.dtype}; squares of gradients underflow in less")
    if x.dim() != 3 or dy.dim() != 3 or x.shape[:2] != dy.shape[:2]:
        raise ValueError(f"x and dy must be [N, T, I] and [N, T, O], got {tuple(x.shape)} and {tuple(dy.shape)}")
    if fisher.shape != (dy.shape[2], x.shape[2]):
        raise ValueError(f"fisher must be [O, I] = {(dy.shape[2], x.shape[2])}, got {tuple(fisher.shape)}")
    for name, tensor in (("x", x), ("dy", dy)):
        if tensor.device != fisher.device:
            raise ValueError(f"{name} must be on fisher's device {fisher.device}, got {tensor.device}; move it there")
