"""FISH Mask: the largest per-sample Fisher information. Source: arXiv 2111.09839."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from sparseft.fisher import FisherScores, estimate_fisher
from sparseft.selection.arguments import check_count


def score(
    model: nn.Module,
    data: Iterable[Any],
    names: list[str],
    *,
    seed: int,
    progress: bool,
    samples: int | None = 1024,
    mode: Literal["empirical", "expected", "sampled"] = "empirical",
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    token_reduction: Literal["mean", "sum", "token"] = "mean",
    label_smoothing: float = 0.0,
    batch_dim: int | Mapping[str, int] | None = None,
    max_dropped: float = 0.05,
    checkpoint: str | os.PathLike[str] | None = None,
) -> tuple[FisherScores, dict[str, Any]]:
    """Return the diagonal of the Fisher information, fp32, in (loss / weight)^2; see `estimate_fisher`.

    Differences from the published code: a head is outside the budget (`dense=` of select), its default score is not
    the absolute gradient, ties and rounding are exact, and one pass costs an ordinary backward, not one a sample.
    """
    check_count("samples", samples, or_all=True)
    scores = estimate_fisher(
        model,
        data,
        samples=samples,
        mode=mode,
        loss=loss,
        token_reduction=token_reduction,
        label_smoothing=label_smoothing,
        batch_dim=batch_dim,
        max_dropped=max_dropped,
        checkpoint=checkpoint,
        names=names,
        seed=seed,
        progress=progress,
    )
    report = scores.report
    return scores, {
        "samples": report.samples,
        "last_position": report.positions[-1],
        "dropped": report.dropped,
        "fallback": report.fallback,
    }
