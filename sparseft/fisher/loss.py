"""What is differentiated: one loss a sample, never the batch's reduced loss, whose scale would have to be undone.

Fisher is (d loss_n / d theta)^2 of the loss of sample n, so its unit is (loss / parameter)^2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseft.fisher import distribution
from sparseft.fisher.batches import Batch, size
from sparseft.fisher.heads import kind_of, logits_of

Mode = Literal["empirical", "expected", "sampled"]
Reduction = Literal["mean", "sum"]
Loss = Callable[[nn.Module, Batch], Tensor]

_DESCRIPTIONS = {
    "classes": "cross-entropy of the class",
    "multilabel": "binary cross-entropy, {0} over the labels",
    "regression": "{1}",
    "tokens": "cross-entropy of the tokens, {2} over those of a sample",
    "causal": "cross-entropy of the next token, {2} over those of a sample",
}


@dataclass
class Pullback:
    """What to backpropagate: each cotangent through outputs, one after the other; their squares are added up.

    outputs: [N, ...], row n depends on sample n only; cotangents: tensors of its shape.
    """

    outputs: Tensor
    cotangents: list[Tensor]

    def finite(self) -> Tensor:
        """Return which samples are finite so far: bool [N]."""
        parts = [self.outputs.detach(), *self.cotangents]
        return torch.stack([part.reshape(len(part), -1).isfinite().all(1) for part in parts]).all(0)


class Objective:
    """Runs a model on a batch and says what to backpropagate.

    Args:
        mode: "empirical", the loss of the given label; "expected", the exact expectation over the model's own
            distribution of the label; "sampled", one label drawn from it.
        loss: a function of (model, batch) that returns the losses [N], in place of the one found from the model.
        reduction: over the tokens of a sample: "mean" is what a transformers model's own loss is for a batch of one.
        seed: of the draws; a sample's draw depends on its position and the seed, not on its batch.
    """

    def __init__(self, mode: Mode, loss: Loss | None, reduction: Reduction, seed: int) -> None:
        if mode not in ("empirical", "expected", "sampled"):
            raise ValueError(f'mode must be "empirical", "expected" or "sampled", got {mode!r}')
        if reduction not in ("mean", "sum"):
            raise ValueError(f'token_reduction must be "mean" or "sum", got {reduction!r}')
        if loss is not None and mode != "empirical":
            raise ValueError(
                f"mode {mode!r} needs the model's distribution, which a loss of your own does not give; "
                'use mode="empirical"'
            )
        self._mode, self._loss, self._reduction, self._seed = mode, loss, reduction, seed
        self.description = "given by the caller" if loss is not None else ""

    def __call__(self, model: nn.Module, batch: Batch, positions: list[int]) -> Pullback:
        """Run the model. positions: where the samples stand in the data."""
        if self._loss is not None:
            return _ones(_checked(self._loss(model, batch), size(batch)))
        inputs, labels = _split(batch)
        if labels is None and self._mode == "empirical":
            raise ValueError(
                'every batch must hold labels ("labels" in a mapping, or (inputs, targets)), got a batch without; '
                'add them, or use mode="expected" or "sampled", which need none'
            )
        logits = logits_of(model, inputs)
        kind = kind_of(model, logits, labels)
        self.description = self._describe(kind)
        if self._mode == "expected":
            return Pullback(logits, distribution.square_root(kind, logits.detach()))
        if self._mode == "sampled":
            labels = distribution.draw(kind, logits.detach(), inputs, labels, positions, self._seed)
        if labels is None:
            raise ValueError("every batch must hold labels")
        return _ones(_losses(kind, logits, labels, self._reduction, likelihood=self._mode == "sampled"))

    def _describe(self, kind: str) -> str:
        empirical = self._mode == "empirical"
        squared = "squared error, mean over the outputs" if empirical else "half the squared error (unit variance)"
        text = _DESCRIPTIONS[kind].format("mean" if empirical else "sum", squared, self._reduction)
        return text + {"empirical": "", "expected": ", in expectation", "sampled": ", at drawn labels"}[self._mode]


def _ones(losses: Tensor) -> Pullback:
    return Pullback(losses, [torch.ones_like(losses)])


def _checked(losses: Any, samples: int) -> Tensor:
    if not isinstance(losses, Tensor) or losses.shape != (samples,):
        got = f"shape {list(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"loss must return one value a sample, shape [{samples}], got {got}; return the losses unreduced "
            '(reduction="none"), summed within each sample'
        )
    return losses


def _split(batch: Batch) -> tuple[Any, Tensor | None]:
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key != "labels"}, batch.get("labels")
    if isinstance(batch, (tuple, list)):
        if len(batch) not in (1, 2):
            raise ValueError(
                f"a batch must be (inputs, targets), got {len(batch)} parts; use a mapping, or pass `loss`"
            )
        return batch[0], batch[1] if len(batch) == 2 else None
    return batch, None


def _losses(kind: str, logits: Tensor, labels: Tensor, reduction: Reduction, likelihood: bool) -> Tensor:
    """Return the loss of each sample, fp32 [N]; likelihood: a sum of log-likelihoods, where heads take a mean."""
    samples = logits.shape[0]
    if kind == "classes":
        return F.cross_entropy(logits, labels.reshape(samples).long(), reduction="none")
    if kind in ("regression", "multilabel"):
        if labels.numel() != logits.numel():
            raise ValueError(
                f"labels must have one value an output, shape {list(logits.shape)}, got {list(labels.shape)}; "
                "check num_labels and problem_type"
            )
        targets = labels.reshape(logits.shape).float()
        if kind == "multilabel":
            losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").flatten(1)
            return losses.sum(1) if likelihood else losses.mean(1)
        squares = (logits - targets).square().flatten(1)
        return squares.sum(1) / 2 if likelihood else squares.mean(1)
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must have one class a token, shape {list(logits.shape[:-1])}, got {list(labels.shape)}; "
            "check the head and the labels, or pass `loss`"
        )
    targets = _next(labels) if kind == "causal" else labels
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten().long(), reduction="none")
    total = losses.view(samples, -1).sum(1)
    # a sample without a label has loss 0, not 0 / 0
    return total if reduction == "sum" else total / targets.ne(-100).flatten(1).sum(1).clamp(min=1)


def _next(labels: Tensor) -> Tensor:
    # shifting the labels, not the logits, saves a copy of the larger of the two
    return F.pad(labels[..., 1:], (0, 1), value=-100)
