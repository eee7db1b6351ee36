"""Mixture-of-experts layers of transformers: weights [E, ...], of which each token meets those its router chose.

Inside such a layer tokens are sorted by expert, and the row of a sample can no longer be told from its place. So the
layer is captured as a whole, where it is known which sample a token is of: hidden states [N * T, H] come in sample
after sample. Its classes share an interface, which says how the weights are laid out; it is recognised by its marks,
and no version of transformers is imported for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from sparseft.fisher.contribution import Vector
from sparseft.fisher.grouped import Grouped, sum_segments
from sparseft.products import autocast_dtype

if TYPE_CHECKING:
    from sparseft.fisher.capture import Capture, Use

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


@contextmanager
def visible_experts(model: nn.Module) -> Iterator[None]:
    """Let modes see calls of the model's experts layers as calls of `run_experts`; undo it on any way out."""
    layers = [module for module in model.modules() if _is_experts(module)]
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.__dict__["forward"] = partial(run_experts, layer, layer.forward)
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.__dict__["forward"]
            if forward is not None:
                layer.__dict__["forward"] = forward


def run_experts(layer: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Tensor:
    """Run an experts layer. To a mode it is one operation, as any function of torch is."""
    tensors = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    if has_torch_function(tensors):
        result: Tensor = handle_torch_function(run_experts, tensors, layer, forward, *args, **kwargs)
        return result
    return forward(*args, **kwargs)


def _is_experts(module: nn.Module) -> bool:
    marks = ("is_transposed", "has_bias", "has_gate", "num_experts", "down_proj")
    return all(hasattr(module, mark) for mark in marks) and hasattr(
        getattr(module, "config", None), "_experts_implementation"
    )


@dataclass
class _Routing:
    """Which row goes to which expert: rows are (token, choice) pairs, sorted by expert, then by sample.

    order: int64 [M], the pair of a row; segment: int64 [M], expert * N + sample of a row; ends: the end of each
    expert's rows.
    """

    order: Tensor
    segment: Tensor
    ends: list[int]

    @classmethod
    def of(cls, chosen: Tensor, experts: int, samples: int) -> _Routing:
        """Route tokens [N * T] to the experts chosen, [N * T, K]."""
        pairs = torch.arange(chosen.numel(), device=chosen.device)
        sample = pairs // (chosen.numel() // samples)
        segment, order = (chosen.reshape(-1).long() * samples + sample).sort(stable=True)
        bounds = torch.arange(1, experts + 1, device=chosen.device) * samples
        return cls(order, segment, torch.searchsorted(segment, bounds).tolist())

    def slices(self) -> Iterator[tuple[int, slice]]:
        """Iterate over the experts that have rows, and where these are."""
        begin = 0
        for expert, end in enumerate(self.ends):
            if begin < end:
                yield expert, slice(begin, end)
            begin = end


class _StackedLinear(torch.autograd.Function):
    """y[m] = x[m] @ matrix[expert of m] + bias[expert of m], whose backward computes no dense weight gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        capture: Capture,
        anchor: Tensor,
        uses: tuple[Use | None, Use | None],
        routing: _Routing,
        transposed: bool,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.capture, ctx.uses, ctx.routing, ctx.transposed = capture, uses, routing, transposed
        matrices = weight if transposed else weight.mT
        y = x.new_empty(len(x), matrices.shape[2])
        for expert, rows in routing.slices():
            if bias is None:
                torch.mm(x[rows], matrices[expert], out=y[rows])
            else:
                torch.addmm(bias[expert], x[rows], matrices[expert], out=y[rows])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        capture: Capture = ctx.capture
        weight_use, bias_use = ctx.uses
        routing: _Routing = ctx.routing
        if weight_use is not None:
            left, right = (x, dy) if ctx.transposed else (dy, x)
            capture.emit(weight_use, Grouped(capture.samples, left, right, routing.segment))
        if bias_use is not None:
            capture.emit(bias_use, Vector(sum_segments(dy, routing.segment, len(weight), capture.samples)))
        dx = None
        if ctx.needs_input_grad[5]:
            matrices = weight.mT if ctx.transposed else weight
            dx = torch.empty_like(x)
            for expert, rows in routing.slices():
                torch.mm(dy[rows], matrices[expert], out=dx[rows])
        return None, None, None, None, None, dx, None, None


@dataclass
class _Step:
    """One of the two products of an expert."""

    weight: Tensor
    bias: Tensor | None
    uses: tuple[Use | None, Use | None]

    @classmethod
    def claimed(cls, capture: Capture, layer: nn.Module, name: str, result: torch.Size) -> _Step:
        weight = getattr(layer, name)
        bias = getattr(layer, name + "_bias") if layer.has_bias else None
        uses = (
            capture.claim(weight, result, "experts", same_shape=True),
            capture.claim(bias, result, "bias", same_shape=True),
        )
        return cls(weight, bias, uses)

    def run(self, capture: Capture, routing: _Routing, transposed: bool, x: Tensor) -> Tensor:
        dtype = autocast_dtype(x)
        weight = capture.sealed(self.weight, self.uses[0]).to(dtype)
        bias = None if self.bias is None else capture.sealed(self.bias, self.uses[1]).to(dtype)
        return capture.run(_StackedLinear, self.uses, routing, transposed, x.to(dtype), weight, bias)


def _experts(
    capture: Capture, layer: Any, forward: Forward, hidden: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor | None:
    if hidden.dim() != 2 or chosen.shape != weights.shape or len(hidden) % capture.samples:
        return None
    routing = _Routing.of(chosen, layer.num_experts, capture.samples)
    if routing.ends[-1] != chosen.numel():
        return None  # experts of other processes
    up = _Step.claimed(capture, layer, "gate_up_proj" if layer.has_gate else "up_proj", hidden.shape)
    down = _Step.claimed(capture, layer, "down_proj", hidden.shape)
    if not any((*up.uses, *down.uses)):
        return None
    choices = chosen.shape[1]
    # every choice is a row of its own before rows change places: the backward of that sums in one order, always
    x = hidden.unsqueeze(1).expand(-1, choices, -1).reshape(-1, hidden.shape[1])[routing.order]
    y = up.run(capture, routing, layer.is_transposed, x)
    y = layer._apply_gate(y) if layer.has_gate else layer.act_fn(y)
    y = down.run(capture, routing, layer.is_transposed, y)
    if getattr(layer, "has_post_expert_norm", False):
        y = layer.post_expert_norm(y)
    back = torch.empty_like(routing.order)
    back[routing.order] = torch.arange(len(back), device=back.device)
    y = y[back].view(len(hidden), choices, -1) * weights.unsqueeze(-1)
    return y.sum(1).to(hidden.dtype)


def _rule(capture: Capture, layer: Any, forward: Forward, *args: Any, **kwargs: Any) -> Tensor | None:
    # the three are passed by place; by name they are called differently from class to class
    return _experts(capture, layer, forward, *args) if len(args) == 3 and not kwargs else None


RULES: dict[Callable[..., Any], Callable[..., Tensor | None]] = {run_experts: _rule}
