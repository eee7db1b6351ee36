"""Attention on the CPU: where torch's own leaves most of the processor idle, that of this package.

torch's computes its small products by MKL, see products.py. Here they are those of the Fisher kernel, and queries
whose gradient is zero are left out.
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


class _Attention(torch.autograd.Function):
    """softmax(scale * query @ key.T + bias) @ value."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, causal: bool
    ) -> Tensor:
        out, log_sums = torch.ops.sparseft.attention(query, key, value, bias, scale, causal)
        ctx.save_for_backward(query, key, value, bias, log_sums)
        ctx.scale, ctx.causal = scale, causal
        result: Tensor = out
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients = torch.ops.sparseft.attention_backward(out_gradient, *ctx.saved_tensors, ctx.scale, ctx.causal)
        return (*gradients, None, None, None)


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
    """Do what torch's function of this name does, by whichever of the two is faster; to fp32 accuracy the same.

    Of a query that sees no key the output is zero.
    """
    if dropout_p == 0 and _served(query, key, value, attn_mask, is_causal, enable_gqa):
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        bias = None if attn_mask is None else _bias(attn_mask).expand(*query.shape[:3], key.shape[2])
        result: Tensor = _Attention.apply(query, key, value, bias, scale, is_causal)  # type: ignore[no-untyped-call]
        return result
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _served(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, grouped: bool) -> bool:
    """Return whether the op of this package takes these arguments, and is faster."""
    tensors = (query, key, value)
    # in plain PyTorch, which serves where nothing is compiled, all scores would be stored
    if ops.SERVED_BY["attention"]["cpu"] != "c++":
        return False
    if not prefer_onednn() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if not all(t.device.type == "cpu" and t.dtype == torch.float32 and t.dim() == 4 and t.numel() for t in tensors):
        return False
    heads, sources = query.shape[1], key.shape[1]
    if heads != sources and not (grouped and heads % sources == 0):
        return False
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        return False
    return mask is None or (not causal and not mask.requires_grad and mask.dtype in (torch.float32, torch.bool))


def _bias(mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(mask.logical_not(), -torch.inf)
