"""The model's own distribution of the label: the square root of its score's covariance, and draws from it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseft.fisher.refusal import Refusal


def square_root(kind: str, logits: Tensor) -> list[Tensor]:
    """Return cotangents r_j with sum_j r_j r_j^T = E[s s^T], s = d(-log p(y)) / d(logits), y drawn from the model.

    Pulling back a square root of the score's covariance gives the exact expectation, in fewer passes than labels.
    """
    if kind == "classes":
        return _multinomial_root(torch.softmax(logits, -1))
    if kind == "multilabel":
        p = torch.sigmoid(logits)
        return _one_by_one((p * (1 - p)).sqrt())
    if kind == "regression":
        return _one_by_one(torch.ones_like(logits))
    raise Refusal(
        'mode "expected" is for classification and regression heads: with a label at every token it would take a '
        'backward pass for every token and class; use mode="sampled"'
    )


def _multinomial_root(p: Tensor) -> list[Tensor]:
    # Cholesky factor of diag(p) - p p^T, [N, C] -> C - 1 columns [N, C]; tail[j] = p[j] + ... + p[C - 1]
    tail = p.flip(-1).cumsum(-1).flip(-1)
    columns = []
    for j in range(p.shape[-1] - 1):
        rest = tail[:, j + 1]
        pivot = (p[:, j] * rest / tail[:, j]).sqrt().nan_to_num(0.0)
        column = torch.zeros_like(p)
        column[:, j] = pivot
        column[:, j + 1 :] = -pivot[:, None] * (p[:, j + 1 :] / rest[:, None]).nan_to_num(0.0)
        columns.append(column)
    return columns


def _one_by_one(scale: Tensor) -> list[Tensor]:
    flat = scale.flatten(1)
    return [(flat * one).view_as(scale) for one in torch.eye(flat.shape[1], device=flat.device)]


def draw(kind: str, logits: Tensor, inputs: Any, labels: Tensor | None, positions: list[int], seed: int) -> Tensor:
    """Draw labels from the model's distribution: classes, independent labels, unit-variance Gaussians, or tokens."""
    drawn = torch.full(logits.shape[:-1], -100, device=logits.device) if kind in ("tokens", "causal") else None
    if drawn is not None:
        scored = labels.ne(-100) if labels is not None else _attended(inputs, drawn)
        if kind == "causal":
            scored = F.pad(scored[:, 1:], (0, 1))
    rows = []
    for n, position in enumerate(positions):
        # a generator takes 32 bits of its seed, so both numbers must be in them
        generator = torch.Generator().manual_seed(random.Random(f"{seed} {position}").getrandbits(32))
        if drawn is not None:
            chosen = logits[n][scored[n]]
            drawn[n, scored[n]] = _classes(chosen, generator)
        elif kind == "classes":
            rows.append(_classes(logits[n : n + 1], generator)[0])
        elif kind == "multilabel":
            uniform = torch.rand(logits[n].shape, generator=generator).to(logits.device)
            rows.append((uniform < torch.sigmoid(logits[n])).float())
        else:
            rows.append(logits[n] + torch.randn(logits[n].shape, generator=generator).to(logits.device))
    if drawn is None:
        return torch.stack(rows)
    return F.pad(drawn[:, :-1], (1, 0), value=-100) if kind == "causal" else drawn


def _classes(logits: Tensor, generator: torch.Generator) -> Tensor:
    # by inverting the distribution function: one uniform number a row, whatever the batch
    cumulative = torch.softmax(logits, -1).cumsum(-1)
    uniform = torch.rand(len(logits), 1, generator=generator).to(logits.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, uniform, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _attended(inputs: Any, like: Tensor) -> Tensor:
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return torch.ones_like(like, dtype=torch.bool) if mask is None else mask.bool()
