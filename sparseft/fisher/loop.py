"""The obvious way, and what FISH published: one backward pass a sample. An oracle, and a benchmark's baseline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from sparseft.fisher.batches import Batch, limited, take, to_device
from sparseft.fisher.loss import Loss, Mode, Objective, Reduction
from sparseft.fisher.parameters import scored_parameters, unwrapped
from sparseft.fisher.sample_dim import SampleDim
from sparseft.fisher.state import evaluation


def batch_one_fisher(
    model: nn.Module,
    data: Iterable[Batch],
    *,
    samples: int | None = 1024,
    mode: Mode = "empirical",
    loss: Loss | None = None,
    token_reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    batch_dim: int | Mapping[str, int] | None = None,
    names: Iterable[str] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return what `estimate_fisher` returns, by a loop of ordinary backward passes over single samples.

    The arguments and the unit are those of `estimate_fisher`; nothing is captured and nothing is dropped.
    Source: FISH Mask, arXiv 2111.09839, and its published code.
    """
    model = unwrapped(model)
    parameters = scored_parameters(model, names)
    turned = SampleDim(batch_dim)
    objective = Objective(mode, loss, token_reduction, seed, label_smoothing=label_smoothing, samples=turned)
    device = next(model.parameters()).device
    fisher = {name: torch.zeros(p.shape, dtype=torch.float32, device=p.device) for name, p in parameters.items()}
    kept = [(p, p.grad) for p in model.parameters()]
    used = 0
    try:
        with evaluation(model, parameters):
            for batch, positions in limited(data, samples, turned.first):
                for index, position in enumerate(positions):
                    pullback = objective(model, to_device(take(batch, [index]), device), [position])
                    for cotangent in pullback.cotangents:
                        model.zero_grad()
                        pullback.outputs.backward(cotangent, retain_graph=len(pullback.cotangents) > 1)
                        for name, p in parameters.items():
                            if p.grad is not None:
                                fisher[name] += p.grad.to_dense().float().square()
                    used += 1
    finally:
        for p, grad in kept:
            p.grad = grad
    return {name: total.div_(used) for name, total in fisher.items()}
