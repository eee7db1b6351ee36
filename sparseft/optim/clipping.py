"""Clipping by the norm of all selected gradients, on the device: no step waits for the host."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

# entries that are gathered at a time, so that clipping needs no second copy of all selected gradients
_AT_A_TIME = 1 << 24
Gradients = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[int]]


def gradient_norm(groups: Iterable[Gradients]) -> Tensor | None:
    """Return the Euclidean norm of the selected gradients of all groups, fp32, 0-d; None where there are none.

    groups: gradients, dense or compact, their index lists, and how many entries those have.
    """
    norms: list[Tensor] = []
    for group in groups:
        for some_grads, some_indices, some_k in _batches(*group):
            whole = [grad.numel() == k for grad, k in zip(some_grads, some_k, strict=True)]
            dense = [j for j, is_whole in enumerate(whole) if not is_whole]
            selected = [grad for grad, is_whole in zip(some_grads, whole, strict=True) if is_whole]
            selected += torch.ops.sparseft.gather([some_grads[j] for j in dense], [some_indices[j] for j in dense])
            norms += torch._foreach_norm(selected, 2, dtype=torch.float32)
    if not norms:
        return None
    # as torch.nn.utils.clip_grad_norm_ does: norms meet on the first one's device
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    return total


def divisor(norm: Tensor, max_norm: float, grad_scale: Tensor | None) -> Tensor:
    """Return what to divide gradients by, which GradScaler has multiplied by grad_scale, for a norm of max_norm."""
    scale: Tensor | float = 1.0 if grad_scale is None else grad_scale.to(norm.device, non_blocking=True)
    # what torch.nn.utils.clip_grad_norm_ multiplies by
    share = (max_norm / (norm / scale + 1e-6)).clamp(max=1.0)
    return scale / share


def _batches(grads: Sequence[Tensor], indices: Sequence[Tensor], k: Sequence[int]) -> Iterator[Gradients]:
    begin = entries = 0
    for i, more in enumerate(k):
        if i > begin and entries + more > _AT_A_TIME:
            yield grads[begin:i], indices[begin:i], k[begin:i]
            begin, entries = i, 0
        entries += more
    if begin < len(grads):
        yield grads[begin:], indices[begin:], k[begin:]
