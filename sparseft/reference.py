"""Every op in plain PyTorch: its meaning, the fallback, the oracle and the baseline of the fast versions.

Read this file to learn what an op computes; csrc/ and kernels/ hold the same names, faster. Nothing here is tuned.
Index lists are flat positions in C order, sorted, unique; int32, or int64 for a tensor of 2^31 elements and more.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


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
        squares = (_wide(dy[n, span]).T @ _wide(x[n, span])).square()
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
    a_j * B + b_j. Accumulates in fp32.
    """
    rows, columns = indices.long() // right.shape[2], indices.long() % right.shape[2]
    result = left.new_empty(left.shape[0], indices.numel(), dtype=_wide(left[:0]).dtype)
    for n in range(left.shape[0]):
        result[n] = (_wide(left[n])[:, rows] * _wide(right[n])[:, columns]).sum(0)
    return result


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
        grad = _wide(dy[begin:end]).T @ _wide(x[begin:end])
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
    return [tensor.reshape(-1)[index.long()] for tensor, index in zip(tensors, indices, strict=True)]


def delta_swap_(params: list[Tensor], indices: list[Tensor], values: list[Tensor]) -> None:
    """Exchange the selected entries of each parameter with `values` [k_i], bit for bit.

    Applies a delta and keeps what it replaced in one pass: the same call again restores it.
    """
    for param, index, value in zip(params, indices, values, strict=True):
        flat = param.view(-1)
        replaced = flat[index.long()]
        flat[index.long()] = value
        value.copy_(replaced)


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    indices: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    lr_tensor: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One AdamW step on the selected entries of every parameter; nothing else is read or written.

    params: contiguous fp32, bf16 or fp16; grads: dense, the parameter's shape, or compact [k], any float dtype;
    exp_avgs, exp_avg_sqs: fp32 [k]; masters: fp32 [k], or empty where the parameter itself is fp32; steps: 0-d fp32,
    one a parameter: steps before this one, which is counted first. lr_tensor, if given, is a 0-d tensor used in place
    of lr. grad_scale and found_inf are GradScaler's: gradients are divided by the first, and nothing changes, nor
    counts, when the second is not 0.
    Source: decoupled weight decay, arXiv 1711.05101, in torch.optim.AdamW's order of operations.
    """
    if found_inf is not None and found_inf.item():
        return
    lr = lr if lr_tensor is None else float(lr_tensor)
    for step in steps:
        step += 1
    for i, (param, index) in enumerate(zip(params, indices, strict=True)):
        grad = _selected_grad(grads[i], index, maximize, grad_scale)
        weight = _selected_weight(param, index, masters[i])
        exp_avgs[i].lerp_(grad, 1 - beta1)
        exp_avg_sqs[i].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        count = float(steps[i])
        correction1, correction2 = 1 - beta1**count, 1 - beta2**count
        denominator = (exp_avg_sqs[i].sqrt() / correction2**0.5).add_(eps)
        weight.mul_(1 - lr * weight_decay).addcdiv_(exp_avgs[i], denominator, value=-lr / correction1)
        _write(param, index, masters[i], weight)


def sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    indices: list[Tensor],
    momentum_buffers: list[Tensor],
    masters: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool = False,
    maximize: bool = False,
    lr_tensor: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One SGD step on the selected entries of every parameter; nothing else is read or written.

    momentum_buffers: fp32 [k], or empty without momentum; at step 1 the buffer becomes the gradient itself, undamped,
    as in torch.optim.SGD. The other arguments are those of adamw_.
    """
    if found_inf is not None and found_inf.item():
        return
    lr = lr if lr_tensor is None else float(lr_tensor)
    for step in steps:
        step += 1
    for i, (param, index) in enumerate(zip(params, indices, strict=True)):
        grad = _selected_grad(grads[i], index, maximize, grad_scale)
        weight = _selected_weight(param, index, masters[i])
        grad = grad + weight_decay * weight
        if momentum:
            buffer = momentum_buffers[i]
            if float(steps[i]) == 1:
                buffer.copy_(grad)
            else:
                buffer.mul_(momentum).add_(grad, alpha=1 - dampening)
            grad = grad + momentum * buffer if nesterov else buffer
        _write(param, index, masters[i], weight - lr * grad)


def index_dtype(numel: int) -> torch.dtype:
    """Return the dtype of index lists into a tensor of `numel` elements."""
    return torch.int32 if numel < 2**31 else torch.int64


def _wide(tensor: Tensor) -> Tensor:
    # arithmetic is fp32 whatever the inputs are stored in; fp64 stays, so that this file can be its own exact answer
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _selected_grad(grad: Tensor, index: Tensor, maximize: bool, grad_scale: Tensor | None) -> Tensor:
    selected = grad.reshape(-1) if grad.numel() == index.numel() else grad.reshape(-1)[index.long()]
    selected = _wide(selected)
    if grad_scale is not None:
        selected = selected / grad_scale
    return -selected if maximize else selected


def _selected_weight(param: Tensor, index: Tensor, master: Tensor) -> Tensor:
    weight = param.view(-1)[index.long()]
    if not master.numel():
        return _wide(weight)
    # a weight that was changed from outside (a delta swapped in) no longer rounds from its master: the weight wins
    return torch.where(master.to(param.dtype) == weight, master, weight.float())


def _write(param: Tensor, index: Tensor, master: Tensor, weight: Tensor) -> None:
    param.view(-1)[index.long()] = weight.to(param.dtype)
    if master.numel():
        master.copy_(weight)
