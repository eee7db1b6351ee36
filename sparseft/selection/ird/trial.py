"""The default evaluator: train a little with a mask, look at the loss on samples that nothing else looked at."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparseft.fisher.batches import to_device
from sparseft.fisher.loss import Objective
from sparseft.fisher.state import evaluation
from sparseft.mask import Mask
from sparseft.selection.ird.pool import Pool


class Trial:
    """Mask -> minus the mean loss on held-out samples, after a few steps of AdamW on the others.

    Every mask starts from the same weights and sees the same batches in the same order, without dropout, so that
    differences are the masks'. The weights are put back bit for bit.

    Args:
        model: as `select` was given it.
        train: samples to train on, batch after batch and over again.
        held_out: samples to measure on.
        objective: the loss; of given labels.
        steps: optimizer steps.
        lr: their learning rate.
    """

    def __init__(
        self, model: nn.Module, train: Pool, held_out: Pool, objective: Objective, steps: int, lr: float
    ) -> None:
        self._model, self._train, self._held_out, self._objective = model, train, held_out, objective
        self._steps, self._lr = steps, lr
        self._device = next(model.parameters()).device

    def __call__(self, mask: Mask) -> float:
        """Return the figure of a mask.

        Raises:
            ValueError: the training diverged.
        """
        every = dict(self._model.named_parameters())
        parameters: dict[str, Tensor] = {name: every[name] for name in (*mask, *mask.dense)}
        indices = {name: mask[name].to(every[name].device).long() for name in mask}
        indices |= {name: torch.arange(every[name].numel(), device=every[name].device) for name in mask.dense}
        with evaluation(self._model, parameters), _restored(parameters, indices) as values:
            optimizer = torch.optim.AdamW(list(values.values()), lr=self._lr, weight_decay=0.0)
            for batch, positions in itertools.islice(itertools.cycle(self._train), self._steps):
                losses = self._losses(batch, positions)
                grads = torch.autograd.grad(losses.mean(), list(parameters.values()), allow_unused=True)
                for name, grad in zip(parameters, grads, strict=True):
                    values[name].grad = None if grad is None else grad.reshape(-1)[indices[name]].float()
                optimizer.step()
                with torch.no_grad():
                    for name, parameter in parameters.items():
                        parameter.view(-1)[indices[name]] = values[name].to(parameter.dtype)
            with torch.no_grad():
                losses = torch.cat([self._losses(batch, positions) for batch, positions in self._held_out])
        figure = -float(losses.mean())
        if not math.isfinite(figure):
            raise ValueError(
                f"the default evaluator must measure a finite loss after its training, got {-figure} at trial_lr="
                f"{self._lr}; choose a lower trial_lr"
            )
        return figure

    def _losses(self, batch: object, positions: list[int]) -> Tensor:
        return self._objective(self._model, to_device(batch, self._device), positions).outputs


@contextmanager
def _restored(parameters: dict[str, Tensor], indices: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield fp32 copies of the chosen entries; put the entries back on any way out."""
    base = {name: parameters[name].detach().view(-1)[index].clone() for name, index in indices.items()}
    try:
        yield {name: values.float().clone() for name, values in base.items()}
    finally:
        with torch.no_grad():
            for name, values in base.items():
                parameters[name].view(-1)[indices[name]] = values
