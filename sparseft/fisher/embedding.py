"""Embeddings: rows looked up by id. Repeated ids of a sample are one row of its gradient, summed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseft.fisher.contribution import Lookup
from sparseft.fisher.refusal import Refusal

if TYPE_CHECKING:
    from sparseft.fisher.capture import Capture, Use


class _Embedding(torch.autograd.Function):
    """y = weight[ids], whose backward computes no dense weight gradient."""

    @staticmethod
    def forward(
        ctx: Any, capture: Capture, anchor: Tensor, use: Use, padding: int | None, ids: Tensor, weight: Tensor
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.capture, ctx.use, ctx.padding = capture, use, padding
        y = weight.new_empty(*ids.shape, weight.shape[1])
        torch.index_select(weight, 0, ids.reshape(-1), out=y.view(-1, weight.shape[1]))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, ...]:
        (ids,) = ctx.saved_tensors
        capture: Capture = ctx.capture
        if ctx.padding is not None:
            dy = dy.masked_fill((ids == ctx.padding).unsqueeze(-1), 0)
        capture.emit(ctx.use, Lookup(capture.split(ids, ctx.use).flatten(1), capture.by_sample(dy, ctx.use)))
        return (None,) * 6


def _embedding(
    capture: Capture,
    ids: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    if ids.dim() == 0:
        return None
    use = capture.claim(weight, (*ids.shape, 0), "embedding", same_shape=True, anywhere=True)
    if use is None:
        return None
    if max_norm is not None or scale_grad_by_freq:
        option = "max_norm" if max_norm is not None else "scale_grad_by_freq"
        raise Refusal(
            f"embedding {use.name!r} must not use {option}: its gradient is then not that of the loss of one sample; "
            "switch it off, or leave the parameter out with `names`"
        )
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    use.ids = capture.split(ids, use).flatten(1).expand(capture.samples, -1)
    return capture.run(_Embedding, use, padding_idx, ids, capture.sealed(weight, use))


RULES: dict[Callable[..., Any], Callable[..., Tensor | None]] = {F.embedding: _embedding}
