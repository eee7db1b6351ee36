"""The Fisher information as other libraries compute it, written after their documentation.

Each function prepares a model of its own and returns what to time. Each library gets what it needs to run at all,
at no cost to itself: positions as an input (a lookup shared by the batch has no per-sample gradient there), no
padding, no dropout, a loss summed over the batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = dict[str, Tensor]
Scores = dict[str, Tensor]
Pass = Callable[[list[Batch]], Scores]


def vmap_grad(model: nn.Module) -> Pass:
    """Sum the squares of the per-sample gradients that torch.func makes, of a whole batch and all weights at once."""
    from torch.func import functional_call, grad, vmap

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: Scores, ids: Tensor, positions: Tensor, label: Tensor) -> Tensor:
        inputs = {"input_ids": ids[None], "position_ids": positions[None]}
        return F.cross_entropy(functional_call(model, parameters, (), inputs).logits, label[None])

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0, 0))

    def run(data: list[Batch]) -> Scores:
        sums = _zeros(parameters)
        for batch in data:
            grads = per_sample(parameters, batch["input_ids"], _positions(batch["input_ids"]), batch["labels"])
            for name, total in sums.items():
                total += grads.pop(name).square_().sum(0)
        return sums

    return run


def opacus(model: nn.Module) -> Pass:
    """Sum the squares of Opacus' `grad_sample`, which its hooks fill during backward. It insists on training mode."""
    from opacus.grad_sample import GradSampleModule

    wrapped = GradSampleModule(model.train(), loss_reduction="sum")
    parameters = dict(model.named_parameters())

    def run(data: list[Batch]) -> Scores:
        sums = _zeros(parameters)
        for batch in data:
            _loss(wrapped, batch).backward()
            for name, parameter in parameters.items():
                sums[name] += parameter.grad_sample.square_().sum(0)
                parameter.grad_sample = parameter.grad = None
        return sums

    return run


def backpack(model: nn.Module) -> Pass:
    """Sum BackPACK's `sum_grad_squared` of the linear layers: it has no layer norm, and loops over a vocabulary."""
    from backpack import backpack as recording
    from backpack import extend
    from backpack.extensions import SumGradSquared

    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for layer in layers:
        extend(layer)
    covered = {id(parameter) for layer in layers for parameter in layer.parameters()}
    parameters = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in covered}

    def run(data: list[Batch]) -> Scores:
        sums = _zeros(parameters)
        for batch in data:
            with recording(SumGradSquared()):
                _loss(model, batch).backward()
            for name, parameter in parameters.items():
                sums[name] += parameter.sum_grad_squared
                del parameter.sum_grad_squared
            model.zero_grad()
        return sums

    return run


PEERS: dict[str, Callable[[nn.Module], Pass]] = {"vmap_grad": vmap_grad, "opacus": opacus, "backpack": backpack}


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    ids = batch["input_ids"]
    return F.cross_entropy(model(input_ids=ids, position_ids=_positions(ids)).logits, batch["labels"], reduction="sum")


def _positions(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1], device=ids.device).expand_as(ids)


def _zeros(like: Scores) -> Scores:
    return {name: torch.zeros_like(tensor, requires_grad=False) for name, tensor in like.items()}
