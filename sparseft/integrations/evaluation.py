"""How good a model is on a split: accuracy, correlation, or loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sparseft.integrations.encoding import Encoded, Features


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a model gives for a split.

    Attributes:
        metrics: "accuracy"; or "pearson" and "spearman"; or "loss" (nats a token) and "perplexity". A correlation
            with a constant is NaN.
        outputs: fp32 [rows, classes] logits; [rows, 1] predictions for regression; [rows, 2] summed loss and number
            of learnt tokens for causal LM.
    """

    metrics: dict[str, float]
    outputs: Tensor


@torch.no_grad()
def evaluate(
    model: Any, encoded: Encoded, split: Sequence[Features], batch_size: int = 32, progress: bool = False
) -> Evaluation:
    """Evaluate a model on a split of encoded data, in evaluation mode, where the model lies."""
    model.eval()
    batches = encoded.batches(split, batch_size, model.device)
    rows = []
    for batch in tqdm(batches, desc="evaluate", disable=not progress, leave=False):
        labels = batch.pop("labels")
        logits = model(**batch).logits.float()
        rows.append((_token_losses(logits, labels) if encoded.task == "causal-lm" else logits).cpu())
    outputs = torch.cat(rows)
    if encoded.task == "causal-lm":
        loss = float(outputs[:, 0].sum() / outputs[:, 1].sum())
        return Evaluation({"loss": loss, "perplexity": math.exp(min(loss, 700.0))}, outputs)
    targets = torch.tensor([features["labels"] for features in split])
    if encoded.task == "regression":
        pair = outputs[:, 0].double(), targets.double()
        return Evaluation({"pearson": _correlation(*pair), "spearman": _correlation(*map(_ranks, pair))}, outputs)
    return Evaluation({"accuracy": float((outputs.argmax(dim=1) == targets).double().mean())}, outputs)


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed loss and the number of learnt tokens of each sequence: [N, 2].

    logits: fp32 [N, T, vocabulary]; labels: int64 [N, T], -100 where nothing is learnt.
    """
    targets = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none")
    return torch.stack([losses.sum(dim=1), (targets != -100).sum(dim=1).float()], dim=1)


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    """Return ranks, ties sharing the mean of theirs."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    ranks: Tensor = counts.cumsum(0) - (counts - 1) / 2
    return ranks[place]
