"""Attention of the Fisher pass on the CPU: its backward leaves out queries whose gradient is zero.

In the last layer of a classifier these are all but one of each sample's. And torch's own kernels leave most of some
processors idle: their small products are MKL's, see products.py. There those of this package serve, whose products are
the Fisher kernel's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparseft import ops
from sparseft.products import prefer_onednn

# torch's kernels, which scaled_dot_product_attention takes in most cases: called by name, backward can be given fewer
# queries than forward had
_FLASH = "_scaled_dot_product_flash_attention_for_cpu"


class _Attention(torch.autograd.Function):
    """softmax(scale * query @ key.T + bias) @ value."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, causal: bool
    ) -> Tensor:
        out, log_sums = _attend(query, key, value, bias, scale, causal)
        ctx.save_for_backward(query, key, value, bias, out, log_sums)
        ctx.scale, ctx.causal = scale, causal
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, out, log_sums = ctx.saved_tensors
        live = None if ctx.causal else _live_queries(out_gradient)
        if live is not None:
            whole = torch.zeros_like(query)
            out_gradient, query, out, log_sums = (
                t.index_select(2, live) for t in (out_gradient, query, out, log_sums)
            )
            bias = None if bias is None else bias.index_select(2, live)
        gradient, *others = _pull_back(out_gradient, query, key, value, bias, out, log_sums, ctx.scale, ctx.causal)
        if live is not None:
            gradient = whole.index_copy_(2, live, gradient)
        return (gradient, *others, None, None, None)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Return the output [N, H, T, D] and the logarithms of the sums of exponentials [N, H, T]."""
    if prefer_onednn():
        out, log_sums = torch.ops.sparseft.attention(query, key, value, bias, scale, causal)
    else:
        flash = getattr(torch.ops.aten, _FLASH)
        out, log_sums = flash(query, key, value, 0.0, causal, attn_mask=bias, scale=scale)
    return out, log_sums


def _pull_back(
    out_gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    log_sums: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, ...]:
    """Return the gradients of queries, keys and values."""
    if prefer_onednn():
        log_sums = log_sums.contiguous()
        gradients = torch.ops.sparseft.attention_backward(
            out_gradient, query, key, value, bias, log_sums, scale, causal
        )
    else:
        flash_backward = getattr(torch.ops.aten, f"{_FLASH}_backward")
        gradients = flash_backward(
            out_gradient, query, key, value, out, log_sums, 0.0, causal, attn_mask=bias, scale=scale
        )
    return tuple(gradients)


def _live_queries(out_gradient: Tensor) -> Tensor | None:
    """Return which queries have a gradient in some sample; None where leaving out the rest would gain little."""
    # the first feature tells of most queries
    if 4 * int(out_gradient[..., 0].count_nonzero()) > out_gradient[..., 0].numel():
        return None
    live = out_gradient.any(3).any(1).any(0)
    live[0] = True  # one at least: kernels refuse none
    found = live.nonzero()[:, 0]
    return found if 4 * len(found) <= len(live) else None


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Do what torch's function of this name does; to fp32 accuracy the same."""
    if dropout_p == 0 and _served(query, key, value, attn_mask, is_causal, enable_gqa):
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        bias = None if attn_mask is None else _bias(attn_mask).expand(*query.shape[:3], key.shape[2])
        result: Tensor = _Attention.apply(query, key, value, bias, scale, is_causal)  # type: ignore[no-untyped-call]
        return result
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _served(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, grouped: bool) -> bool:
    """Return whether these arguments are taken here; else torch's own function does what it would."""
    tensors = (query, key, value)
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if not all(t.device.type == "cpu" and t.dtype == torch.float32 and t.dim() == 4 and t.numel() for t in tensors):
        return False
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        return False
    if mask is not None and (causal or mask.requires_grad or mask.dtype not in (torch.float32, torch.bool)):
        return False
    heads, sources = query.shape[1], key.shape[1]
    if prefer_onednn():
        # in plain PyTorch, which serves where nothing is compiled, all scores would be stored
        return ops.SERVED_BY["attention"]["cpu"] == "c++" and (heads == sources or (grouped and heads % sources == 0))
    # where torch takes these kernels itself
    return (
        hasattr(torch.ops.aten, _FLASH)
        and torch.backends.cuda.flash_sdp_enabled()  # it counts on the CPU too
        and heads == sources
        and query.shape[3] == value.shape[3]
        and all(tensor.stride(3) == 1 for tensor in tensors)
    )


def _bias(mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(mask.logical_not(), -torch.inf)
