"""Fan-outs: where a tensor that all samples share meets the batch, it gets a copy for each, with its own gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparseft.fisher.layout import Layout

if TYPE_CHECKING:
    from sparseft.fisher.shared import Shared


@dataclass(eq=False)
class SharedTensor:
    """A shared tensor, at the version at which it was shared, and the parameters it was computed from."""

    tensor: Tensor
    version: int
    names: frozenset[str]
    _outlet: Tensor | None = None

    def outlet(self) -> Tensor:
        """Return where gradients enter that come back to it: a copy, whatever may be done to the tensor later."""
        if self._outlet is None:
            self._outlet = self.tensor.clone()
        return self._outlet


@dataclass(eq=False)
class FanOut:
    """One place where a shared tensor meets the batch, and how its copies lie there."""

    names: frozenset[str]
    occurrence: int
    layout: Layout


class _Copies(torch.autograd.Function):
    """y = value for each sample (or several times), [copies, *shape]; what comes back is not added up."""

    @staticmethod
    def forward(
        ctx: Any, shared: Shared, anchor: Tensor, fan_out: FanOut, source: SharedTensor, copies: int, value: Tensor
    ) -> Tensor:
        ctx.shared, ctx.fan_out, ctx.source = shared, fan_out, source
        return value.unsqueeze(0).expand(copies, *value.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, ...]:
        ctx.shared.receive(ctx.fan_out, ctx.source, dy)
        return (None,) * 6


def copies_of(source: SharedTensor, shared: Shared, anchor: Tensor, fan_out: FanOut, copies: int) -> Tensor:
    """Return copies of a shared tensor, [copies, *shape], without an edge to it."""
    made: Tensor = _Copies.apply(shared, anchor, fan_out, source, copies, source.outlet().detach())  # type: ignore[no-untyped-call]
    return made


def outlets(node: Any) -> list[Any]:
    """Return the nodes that gradients enter again which a node of the autograd graph kept apart."""
    source = getattr(node, "source", None)
    return [source.outlet().grad_fn] if isinstance(source, SharedTensor) else []
