"""Losses that depend on other samples, however little: in-batch negatives, the balancing loss of a router.

A gradient that reaches other samples gives many of them away, but not all: negatives may be detached. So a sample is
compared with itself, beside another sample and beside its own copy, which must make no difference.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparseft.fisher.batches import Batch, size, take, tensors
from sparseft.fisher.loss import Objective

# what rounding may do to a loss, in units of rounding, and to a gradient, relative to the largest: the runs compared
# have the same shapes, but a mask that is all ones may take another kernel
_LOSS, _GRADIENT = 64, 1e-3
_LABELS = ("labels", "1")  # of a mapping, of a pair


def company(batch: Batch) -> list[int]:
    """Return the first sample and the one that differs from it in most tensors; it alone, if inputs are all the same.

    The more differs, the more ways to depend on another sample there are to be seen.
    """
    count = size(batch)
    rows = {path: t.reshape(count, -1) for path, t in tensors(batch).items() if t.dim() and len(t) == count}
    differs = {path: t.ne(t[:1]).any(1).cpu() for path, t in rows.items()}
    inputs = [differs[path] for path in differs if path not in _LABELS] or list(differs.values())
    found = torch.stack(inputs).any(0) * torch.stack(list(differs.values())).sum(0)
    other = int(found.argmax())
    return [0, other] if found[other] else [0]


def same(before: Tensor, after: Tensor, eps: float) -> bool:
    """Return whether the outputs of a sample are the same, but for rounding, in two runs of the same shapes.

    eps: the coarsest precision that the model computes in.
    """
    eps = precision(before, eps)
    tolerance = min(_LOSS * eps, max(0.01, eps**0.5))
    return torch.allclose(before, after, rtol=tolerance, atol=tolerance, equal_nan=True)


def check_same(before: Tensor, after: Tensor, eps: float) -> None:
    """Raise if the outputs of a sample differ between two runs of the same shapes, beside others."""
    if not same(before, after, eps):
        raise coupled(f"its value changed from {before.tolist()} to {after.tolist()}")


def check_uncoupled(
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    positions: list[int],
    beside: list[int],
    place: int,
    parameters: Mapping[str, Tensor],
    eps: float,
) -> None:
    """Raise if the loss of one of some samples changes when copies of it replace the others, or its gradient.

    Both runs have the same shapes, so that they round alike, and a dependence shows that is far below what a change
    of the batch size does to the loss.

    Args:
        model: in evaluation mode.
        objective: the loss.
        batch: holds the samples.
        positions: where its samples stand in the data.
        beside: samples of the batch, by index.
        place: of the one, among them.
        parameters: where a gradient reached other samples, or may have.
        eps: the coarsest precision that the model computes in.
    """
    itself = [beside[place]] * len(beside)
    (before, grads), (after, others) = (
        _at(place, model, objective, batch, positions, chosen, {**parameters, **scales(model)})
        for chosen in (beside, itself)
    )
    eps = max(eps, *(torch.finfo(parameter.dtype).eps for parameter in parameters.values()))
    check_same(before, after, eps)
    if precision(before, eps) > torch.finfo(torch.float32).eps:
        return
    # some gradients (of a key's bias, of a router that chooses one expert) are zero but for rounding
    floor = 1e-3 * max(float(grad.abs().max()) for grad in grads.values())
    for name in parameters:
        grad = grads[name]
        largest = max(float(grad.abs().max()), floor)
        if float((grad - others[name]).abs().max()) > _GRADIENT * largest:
            raise coupled(f"its gradient in {name} changed")


def scales(model: nn.Module) -> dict[str, Tensor]:
    """Return a few small parameters of a model, whose gradients tell what is large; the names are no parameter's."""
    return {f"{name} of the model": p for name, p in model.named_parameters() if p.requires_grad and p.dim() < 2}


def precision(outputs: Tensor, eps: float) -> float:
    """Return the unit of rounding that outputs may differ by, of a model whose coarsest precision is eps."""
    coarse = outputs.is_cuda and torch.get_float32_matmul_precision() != "highest"
    return max(eps, torch.finfo(torch.float16).eps) if coarse else eps


def _at(
    place: int,
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    positions: list[int],
    chosen: list[int],
    parameters: Mapping[str, Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the outputs of the sample at a place among the chosen, and the gradients of their sum."""
    outputs = objective(model, take(batch, chosen), [positions[sample] for sample in chosen]).outputs[place]
    if not outputs.requires_grad:
        return outputs, {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    grads = torch.autograd.grad(outputs.sum(), list(parameters.values()), allow_unused=True, materialize_grads=True)
    return outputs.detach(), {name: grad.to_dense() for name, grad in zip(parameters, grads, strict=True)}


def coupled(what: str) -> ValueError:
    """Return the error for a loss that depends on the other samples of its batch."""
    return ValueError(
        f"the loss of a sample must depend on that sample alone, but {what} with the other samples of its batch; "
        "losses across a batch (in-batch negatives, the balancing loss of a router), batch norm with the statistics "
        "of the batch and randomness in evaluation mode have no per-sample gradient; if samples are not the first "
        "dimension of the batch's tensors, name theirs with `batch_dim`"
    )
