"""Steps inside the backward pass: a gradient is applied as soon as it is complete, and freed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def step_in_backward(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Have every parameter of an optimizer updated during backward, one after the other, its gradient freed at once.

    with sparseft.step_in_backward(optimizer):
        for batch in loader:
            model(**batch).loss.backward()  # and that is the step

    So no two gradients exist at the same time. What needs all of them before the first update is not to be had: there
    is no clipping, no accumulation over batches, and no loss scaling. Reentrant checkpointing, which runs backward
    in parts, is not to be had where parts share a parameter.

    Args:
        optimizer: any torch optimizer that keeps the parameters of a step independent of each other, as those of this
            package do.

    Raises:
        RuntimeError: `optimizer.step()` is called inside, as accumulation and GradScaler do; there are gradients
            from before; or several processes train together. Nothing was changed.
        ValueError: the optimizer clips.
    """
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise RuntimeError(
            f"steps in backward are for one process, got {torch.distributed.get_world_size()}: each would step by its "
            "own gradients, before they are averaged"
        )
    clipped = [group["max_norm"] for group in optimizer.param_groups if group.get("max_norm") is not None]
    if clipped:
        raise ValueError(
            f"max_norm must be None for steps in backward, got {clipped[0]}: the norm of all gradients is known only "
            "when the last of them is there"
        )
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if any(param.grad is not None for param in params):
        raise RuntimeError(
            "there are gradients already, which steps in backward would use; call optimizer.zero_grad()"
        )
    stepping = False

    def refuse(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not stepping:
            raise RuntimeError(
                "steps are taken in backward: do not call optimizer.step(); to accumulate gradients, to clip them or "
                "to scale the loss, leave step_in_backward"
            )

    def apply(param: Tensor) -> None:
        nonlocal stepping
        stepping = True
        try:
            optimizer.step()
        finally:
            stepping = False
            param.grad = None

    handles = [optimizer.register_step_pre_hook(refuse)]
    handles += [param.register_post_accumulate_grad_hook(apply) for param in params if param.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
