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
from sparseft.fisher.refusal import Refusal
from sparseft.fisher.sample_dim import SampleDim

Mode = Literal["empirical", "expected", "sampled"]
Reduction = Literal["mean", "sum", "token"]
Loss = Callable[[nn.Module, Batch], Tensor]

_IGNORED = -100  # the label of what has none
_DESCRIPTIONS = {
    "classes": "cross-entropy of the class{3}",
    "multilabel": "binary cross-entropy, {0} over the labels",
    "regression": "{1}",
    "tokens": "cross-entropy of the tokens{3}, {2}",
    "causal": "cross-entropy of the next token{3}, {2}",
}
_TOKENS = {
    "mean": "mean over those of a sample",
    "sum": "sum over those of a sample",
    "token": "each squared by itself and the squares summed over those of a sample",
}


@dataclass
class Pullback:
    """What to backpropagate: each cotangent through outputs, one after the other; their squares are added up.

    outputs: [N, ...], row n depends on sample n only; cotangents: tensors of its shape; targets: what the outputs were
    made with, labels that were checked or drawn, with samples first.
    """

    outputs: Tensor
    cotangents: list[Tensor]
    targets: Tensor | None = None

    def finite(self) -> Tensor:
        """Return which samples are finite so far: bool [N]."""
        parts = [self.outputs.detach(), *self.cotangents]
        return torch.stack([part.reshape(len(part), -1).isfinite().all(1) for part in parts]).all(0)


class Objective:
    """Runs a model on a batch and says what to backpropagate.

    Args:
        mode: "empirical", the loss of the given label; "expected", the exact expectation over the model's own
            distribution of the label; "sampled", one label drawn from it.
        loss: a function of (model, batch) that returns the losses [N], or [N, T] with reduction "token", in place of
            the one found from the model.
        reduction: over the tokens of a sample: "mean" is what a transformers model's own loss is for a batch of one;
            "token" keeps them apart, each with a gradient of its own.
        seed: of the draws; a sample's draw depends on its position and the seed, not on its batch.
        label_smoothing: share of the target spread evenly over all classes, as in `torch.nn.functional.cross_entropy`.
        samples: where the samples are in what the model takes; batches come here with samples first.
    """

    def __init__(
        self,
        mode: Mode,
        loss: Loss | None,
        reduction: Reduction,
        seed: int,
        *,
        label_smoothing: float = 0.0,
        samples: SampleDim | None = None,
    ) -> None:
        _check(mode, loss, reduction, label_smoothing)
        self._mode, self._loss, self._reduction, self._seed = mode, loss, reduction, seed
        self._smoothing, self._samples = label_smoothing, samples or SampleDim(0)
        self.description = "" if loss is None else _described(loss, reduction)
        self.settings: dict[str, str | float] = {
            "mode": mode,
            "loss": "" if loss is None else _named(loss),
            "token_reduction": reduction,
            "label_smoothing": label_smoothing,
            **({"seed": seed} if mode == "sampled" else {}),
        }

    def __call__(self, model: nn.Module, batch: Batch, positions: list[int]) -> Pullback:
        """Run the model. positions: where the samples stand in the data."""
        if self._loss is not None:
            losses = self._own_losses(self._loss, model, batch)
            return Pullback(losses, self._cotangents(losses, torch.ones_like(losses, dtype=torch.bool)))
        inputs, labels = inputs_and_labels(batch)
        if labels is None and self._mode == "empirical":
            raise Refusal(
                'every batch must hold labels ("labels" in a mapping, or (inputs, targets)), got a batch without; '
                'add them; estimate_fisher and method "fish" need none with mode="expected" or "sampled"'
            )
        logits = self._logits(model, batch, labels)
        kind = kind_of(model, logits, labels)
        self.description = self._describe(kind)
        if self._mode == "expected":
            return Pullback(logits, distribution.square_root(kind, logits.detach()))
        if self._mode == "sampled":
            labels = distribution.draw(kind, logits.detach(), inputs, labels, positions, self._seed)
        if labels is None:
            raise Refusal("every batch must hold labels")
        targets = self._targets(kind, logits, labels)
        losses = self._losses(kind, logits, targets)
        return Pullback(losses, self._cotangents(losses, targets.ne(_IGNORED)), targets)

    def outputs(self, model: nn.Module, batch: Batch, targets: Tensor | None) -> Tensor:
        """Run the model again, on samples of a batch; return the outputs of its pullback for them.

        targets: of the pullback. Nothing here looks at a value, as transforms of `torch.func` must have it.
        """
        if self._loss is not None:
            return self._own_losses(self._loss, model, batch)
        labels = inputs_and_labels(batch)[1]
        logits = self._logits(model, batch, labels)
        return logits if targets is None else self._losses(kind_of(model, logits, labels), logits, targets)

    def _own_losses(self, loss: Loss, model: nn.Module, batch: Batch) -> Tensor:
        return _checked(loss(model, self._samples.back(batch)), size(batch), self._reduction == "token")

    def _logits(self, model: nn.Module, batch: Batch, labels: Tensor | None) -> Tensor:
        """Return the logits, samples first: a model puts them where the labels have them."""
        logits = logits_of(model, *inputs_and_labels(self._samples.back(batch)))
        if labels is not None:
            logits = logits.movedim(self._samples.of("labels" if isinstance(batch, Mapping) else "1", labels), 0)
        if logits.shape[0] != size(batch):
            raise Refusal(
                f"logits must have the {size(batch)} samples first, got shape {list(logits.shape)}; name the sample "
                "dimension of inputs and labels with `batch_dim`, or pass `loss`"
            )
        return logits

    def _targets(self, kind: str, logits: Tensor, labels: Tensor) -> Tensor:
        """Return what the losses take, if the labels fit: classes, int64 [N] or [N, T]; or fp32, like the logits."""
        if kind in ("tokens", "causal"):
            return _token_targets(kind, logits, labels)
        if kind == "classes":
            return _checked_classes(labels.reshape(len(logits)), logits)
        if self._smoothing:
            raise Refusal(f"label_smoothing is for cross-entropy over classes, got a {kind} head; leave it out")
        if labels.numel() != logits.numel():
            raise Refusal(
                f"labels must have one value an output, shape {list(logits.shape)}, got {list(labels.shape)}; "
                "check num_labels and problem_type"
            )
        return labels.reshape(logits.shape).float()

    def _losses(self, kind: str, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the losses, fp32 [N], or [N, T] with reduction "token"; 0 where there is no label."""
        if kind not in ("classes", "tokens", "causal"):
            return _output_losses(kind, logits, targets, likelihood=self._mode == "sampled")
        flat = F.cross_entropy(
            logits.flatten(0, -2), targets.flatten(), reduction="none", label_smoothing=self._smoothing
        )
        losses = flat.view(targets.shape)
        if kind == "classes" or self._reduction == "token":
            return losses
        total = losses.sum(1)
        # a sample without a label has loss 0, not 0 / 0
        return total if self._reduction == "sum" else total / targets.ne(_IGNORED).sum(1).clamp(min=1)

    def _cotangents(self, losses: Tensor, scored: Tensor) -> list[Tensor]:
        """Return one for all of a sample, or for each of its tokens that is scored, bool [N, T], one after the other.

        Tokens of one sample share its layers' inputs, in both directions, so each needs a backward pass of its own;
        those of different samples do not.
        """
        if losses.dim() == 1:
            return [torch.ones_like(losses)]
        rank = scored.cumsum(1).masked_fill(~scored, 0)
        return [rank.eq(k).to(losses.dtype) for k in range(1, int(rank.max()) + 1)]

    def _describe(self, kind: str) -> str:
        empirical = self._mode == "empirical"
        squared = "squared error, mean over the outputs" if empirical else "half the squared error (unit variance)"
        text = _DESCRIPTIONS[kind].format(
            "mean" if empirical else "sum",
            squared,
            _TOKENS[self._reduction],
            f" (label smoothing {self._smoothing})" if self._smoothing else "",
        )
        drawn = f", at labels drawn with seed {self._seed}"
        return text + {"empirical": "", "expected": ", in expectation", "sampled": drawn}[self._mode]


def _check(mode: Mode, loss: Loss | None, reduction: Reduction, smoothing: float) -> None:
    if mode not in ("empirical", "expected", "sampled"):
        raise ValueError(f'mode must be "empirical", "expected" or "sampled", got {mode!r}')
    if reduction not in _TOKENS:
        raise ValueError(f'token_reduction must be "mean", "sum" or "token", got {reduction!r}')
    if not 0 <= smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {smoothing}")
    if loss is not None and mode != "empirical":
        raise ValueError(
            f"mode {mode!r} needs the model's distribution, which a loss of your own does not give; "
            'use mode="empirical"'
        )
    if smoothing and (loss is not None or mode != "empirical"):
        raise ValueError(
            "label_smoothing changes the loss at given labels: it has no meaning with a loss of your own, nor in mode "
            f'{mode!r}; smooth inside the loss, or use mode="empirical"'
        )


def _described(loss: Loss, reduction: Reduction) -> str:
    return f"given by the caller ({_named(loss)})" + (f", tokens {_TOKENS['token']}" if reduction == "token" else "")


def _named(loss: Loss) -> str:
    return getattr(loss, "__qualname__", type(loss).__qualname__)


def _checked(losses: Any, samples: int, by_token: bool) -> Tensor:
    fits = isinstance(losses, Tensor) and losses.dim() == 1 + by_token and losses.shape[0] == samples
    if not fits:
        got = f"shape {list(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        wanted = f"one value a token, shape [{samples}, T]" if by_token else f"one value a sample, shape [{samples}]"
        summed = "" if by_token else ", summed within each sample"
        raise Refusal(f'loss must return {wanted}, got {got}; return the losses unreduced (reduction="none"){summed}')
    return losses  # type: ignore[no-any-return]


def inputs_and_labels(batch: Batch) -> tuple[Any, Tensor | None]:
    """Return what a model is given, and the labels: those of a mapping, or the second part of a pair."""
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key != "labels"}, batch.get("labels")
    if isinstance(batch, (tuple, list)):
        if len(batch) not in (1, 2):
            raise Refusal(f"a batch must be (inputs, targets), got {len(batch)} parts; use a mapping, or pass `loss`")
        return batch[0], batch[1] if len(batch) == 2 else None
    return batch, None


def _output_losses(kind: str, logits: Tensor, targets: Tensor, likelihood: bool) -> Tensor:
    """Return the loss of each sample over its outputs, fp32 [N]; likelihood: a sum of log-likelihoods, not a mean."""
    if kind == "multilabel":
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").flatten(1)
        return losses.sum(1) if likelihood else losses.mean(1)
    squares = (logits - targets).square().flatten(1)
    return squares.sum(1) / 2 if likelihood else squares.mean(1)


def _checked_classes(targets: Tensor, logits: Tensor) -> Tensor:
    """Return targets as int64, if each is a class of the logits or ignored; a GPU would abort the process instead."""
    low, high = int(targets.min()), int(targets.max())
    classes = logits.shape[-1]
    if (low < 0 and low != _IGNORED) or high >= classes:
        raise Refusal(
            f"labels must be classes from 0 to {classes - 1}, or -100 to ignore one, got {low if low < 0 else high}; "
            "check num_labels and the labels"
        )
    return targets.long()


def _token_targets(kind: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the class that is wanted of each token's logits, int64 [N, T], -100 where there is none."""
    if labels.shape != logits.shape[:-1]:
        raise Refusal(
            f"labels must have one class a token, shape {list(logits.shape[:-1])}, got {list(labels.shape)}; "
            "check the head and the labels, or pass `loss`"
        )
    # shifting the labels, not the logits, saves a copy of the larger of the two
    targets = F.pad(labels[..., 1:], (0, 1), value=_IGNORED) if kind == "causal" else labels
    return _checked_classes(targets, logits).flatten(1)
