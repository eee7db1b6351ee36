"""Every op in plain PyTorch: its meaning, the fallback, the oracle and the baseline of the fast versions.

Read this file, and reference_optim.py for the optimizers, to learn what an op computes; csrc/ and kernels/ hold the
same names, faster. Nothing here is tuned.
Index lists are what index_lists.py says: positions, or packed.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from sparseft.index_lists import index_dtype, positions
from sparseft.reference_optim import adamw_, lion_, sgd_, wide

__all__ = [
    "adamw_",
    "attention",
    "attention_backward",
    "delta_swap_",
    "fisher_linear_",
    "fisher_linears_",
    "fisher_segments_",
    "gather",
    "layer_norm_backward",
    "lion_",
    "outer_at",
    "selected_grad_",
    "sgd_",
    "topk_indices",
]


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
    where `selected`, bool [O, I], is true, or over all. Tokens at either end of a sample whose row of dy is zero, as
    padding's is, count nothing, whatever x holds there. Accumulates in fp32. Units: (loss / parameter)**2, of the loss
    whose gradient dy is: pass the gradient of per-sample losses that were summed, not averaged, over the batch.
    Source: FISH Mask, arXiv 2111.09839, equation 4, for one layer.
    """
    for n in range(x.shape[0]):
        tokens = dy[n].ne(0).any(1).nonzero().flatten().tolist() or [0, -1]
        span = slice(tokens[0], tokens[-1] + 1)
        squares = (wide(dy[n, span]).T @ wide(x[n, span])).square()
        fisher += (1.0 if sample_weight is None else sample_weight[n]) * squares
        if scores is not None:
            scores[n] += (squares if selected is None else squares[selected]).sum()


def fisher_linears_(fishers: list[Tensor], xs: list[Tensor], dys: list[Tensor]) -> None:
    """Do what `fisher_linear_(fisher, x, dy)` does, for every layer of three lists.

    Layers may differ in sizes and dtypes; no two of fishers may share memory. One call serves many small layers, each
    of which alone would leave most of a processor idle.
    """
    for fisher, x, dy in zip(fishers, xs, dys, strict=True):
        fisher_linear_(fisher, x, dy)


def outer_at(left: Tensor, right: Tensor, indices: Tensor) -> Tensor:
    """Return `sum_t left[n, t, a_j] * right[n, t, b_j]` for every sample n and chosen entry j: fp32 [N, k].

    For left = dy and right = x they are the gradients of a Linear weight [O, I], per sample, at k entries.
    left: [N, T, A]; right: [N, T, B], of one dtype, fp32, bf16 or fp16, any strides; indices: [k], flat positions
    a_j * B + b_j, not packed. Accumulates in fp32.
    """
    rows, columns = indices.long() // right.shape[2], indices.long() % right.shape[2]
    result = left.new_empty(left.shape[0], indices.numel(), dtype=wide(left[:0]).dtype)
    for n in range(left.shape[0]):
        result[n] = (wide(left[n])[:, rows] * wide(right[n])[:, columns]).sum(0)
    return result


def selected_grad_(grad: Tensor, x: Tensor, dy: Tensor, indices: Tensor) -> None:
    """Add `sum_m dy[m, row_j] * x[m, column_j]` to grad[j]: the gradient of a Linear weight [O, I] at its entry j.

    grad: fp32 [k]; x: [M, I]; dy: [M, O], same dtype as x (fp32, bf16, fp16), any strides; indices: the list of
    k positions row_j * I + column_j; a weight [I, O] takes x and dy in each other's place. Accumulates in fp32.
    """
    product = wide(dy).T @ wide(x)
    grad += product.flatten()[positions(indices, product.numel()).long()]


def fisher_segments_(
    fisher: Tensor,
    x: Tensor,
    dy: Tensor,
    offsets: Tensor,
    groups: Tensor | None = None,
    weight: Tensor | None = None,
) -> None:
    """Add `w_s * (sum over the rows m of segment s of dy[m,:] outer x[m,:])**2` to the Fisher slab of its group.

    What fisher_linear_ does for rows in segments of any length: samples without padding, or the tokens that each
    sample sent to each expert. fisher: fp32 [O, I], or [G, O, I] with groups; x: [M, I]; dy: [M, O], same dtype as x
    (fp32, bf16, fp16); offsets: int64 [S + 1], ascending, segment s holds the rows offsets[s] .. offsets[s + 1] - 1;
    groups: int64 [S], the slab of a segment, in any order; weight: fp32 [S] or None for ones.
    Source: FISH Mask, arXiv 2111.09839, equation 4, for one layer whose rows belong to samples and experts.
    """
    bounds = offsets.tolist()
    for s, (begin, end) in enumerate(itertools.pairwise(bounds)):
        slab = fisher if groups is None else fisher[int(groups[s])]
        grad = wide(dy[begin:end]).T @ wide(x[begin:end])
        slab += (1.0 if weight is None else weight[s]) * grad.square()


def topk_indices(scores: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Return where the k largest of all scores are, exactly k of them, ties going to the lowest (tensor, index).

    scores: fp32, bf16 or fp16 tensors of any shape, finite. Returns `indices` [k], the positions inside each tensor,
    tensor after tensor, ascending (int32, or int64 if any tensor has 2^31 elements or more), and `counts`, int64
    [len(scores)], how many belong to each tensor. Both on the scores' device.
    """
    flat = torch.cat([score.reshape(-1).float() for score in scores])
    bad = int((~torch.isfinite(flat)).sum())
    if bad:
        raise ValueError(f"scores must be finite, got {bad} NaN or infinite values; drop the samples that caused them")
    chosen = torch.sort(flat, descending=True, stable=True).indices[:k].sort().values
    ends = torch.tensor([score.numel() for score in scores], device=flat.device).cumsum(0)
    tensor_of = torch.searchsorted(ends, chosen, right=True)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    counts = torch.bincount(tensor_of, minlength=len(scores))
    return (chosen - starts[tensor_of]).to(index_dtype(max(score.numel() for score in scores))), counts


def gather(tensors: list[Tensor], indices: list[Tensor]) -> list[Tensor]:
    """Return the selected entries of each tensor: [k_i], the tensor's dtype.

    Compacts gradients, and extracts the values of a delta.
    """
    pairs = zip(tensors, indices, strict=True)
    return [tensor.reshape(-1)[positions(index, tensor.numel()).long()] for tensor, index in pairs]


def delta_swap_(params: list[Tensor], indices: list[Tensor], values: list[Tensor]) -> None:
    """Exchange the selected entries of each parameter with `values` [k_i], bit for bit.

    Applies a delta and keeps what it replaced in one pass: the same call again restores it.
    """
    for param, index, value in zip(params, indices, values, strict=True):
        flat, selected = param.view(-1), positions(index, param.numel()).long()
        replaced = flat[selected]
        flat[selected] = value
        value.copy_(replaced)


def attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Return `softmax(scale * query @ key.T + bias) @ value` and the logarithms of the sums softmax divides by.

    query: fp32 [N, H, T, D]; key: [N, G, S, D] and value: [N, G, S, E], where head h of H uses head h // (H / G);
    bias: fp32 [N, H, T, S], any strides, or None; causal: query t sees keys 0 to t. Returns [N, H, T, E], whose memory
    is [N, T, H, E], and [N, H, T]. A query that sees no key, all of whose scores are -inf, gets zeros in both. No
    tensor may be empty.
    """
    scores = _scores(query, key, bias, scale, causal)
    log_sums = scores.logsumexp(-1)
    log_sums = log_sums.masked_fill(log_sums == -torch.inf, 0)
    return _tokens_first((scores - log_sums[..., None]).exp() @ _for_heads(value, query)), log_sums


def attention_backward(
    out_gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    log_sums: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `attention`'s query, key and value, whose memory is [N, tokens, heads, features].

    out_gradient: [N, H, T, E], of the output; log_sums: what `attention` returned beside it.
    """
    probabilities = (_scores(query, key, bias, scale, causal) - log_sums[..., None]).exp()
    gradients = out_gradient @ _for_heads(value, query).mT
    gradients = scale * probabilities * (gradients - (probabilities * gradients).sum(-1, keepdim=True))
    results = (
        gradients @ _for_heads(key, query),
        (gradients.mT @ query).unflatten(1, (key.shape[1], -1)).sum(2),
        (probabilities.mT @ out_gradient).unflatten(1, (key.shape[1], -1)).sum(2),
    )
    return _tokens_first(results[0]), _tokens_first(results[1]), _tokens_first(results[2])


def layer_norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of LayerNorm's input, and for every sample those of its weight and bias.

    Of `y = (x - mean) * rstd * weight + bias`, where mean and rstd follow from x. dy, x: fp32 [N, T, H]; mean, rstd:
    fp32 [N, T], as torch.native_layer_norm returns them; weight: fp32 [H], or None for ones. Any strides. Returns
    [N, T, H], [N, H] and [N, H], contiguous.
    """
    rstd = rstd[..., None]
    normalized = (x - mean[..., None]) * rstd
    scaled = dy if weight is None else dy * weight
    of_rstd = (scaled * normalized).mean(-1, keepdim=True)
    dx = rstd * (scaled - scaled.mean(-1, keepdim=True) - normalized * of_rstd)
    return dx, (dy * normalized).sum(1), dy.sum(1)


def _scores(query: Tensor, key: Tensor, bias: Tensor | None, scale: float, causal: bool) -> Tensor:
    scores = scale * query @ _for_heads(key, query).mT
    if bias is not None:
        scores = scores + bias
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return scores


def _for_heads(shared: Tensor, query: Tensor) -> Tensor:
    return shared.repeat_interleave(query.shape[1] // shared.shape[1], 1)


def _tokens_first(heads: Tensor) -> Tensor:
    return heads.transpose(1, 2).contiguous().transpose(1, 2)
