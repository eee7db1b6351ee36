"""Child-Tuning-D: the largest Fisher information over the training set. Source: arXiv 2109.05687.

Child-Tuning-F of the same paper draws another random child network at every step, and divides the gradients kept by
their share. That is a schedule, `sparseft.schedules.ChildTuningF`; a child drawn once is method "random".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparseft.fisher import estimate_fisher
from sparseft.fisher.loss import Objective
from sparseft.selection.arguments import check_count
from sparseft.selection.gradient import for_each_gradient, zeros
from sparseft.selection.watched import first_samples


def score(
    model: nn.Module,
    data: Iterable[Any],
    names: list[str],
    *,
    seed: int,
    progress: bool,
    fisher: Literal["sample", "batch"] = "sample",
    samples: int | None = 1024,
    max_norm: float | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return squared gradients averaged over the data, fp32, in (loss / weight)^2.

    Differences from the published code. It squares the gradient of each batch's mean loss, after clipping each
    tensor's gradient to norm 1, with dropout on, over the whole training set; `fisher="batch"`, `max_norm=1.0` and
    `samples=None` are that, without dropout. The default is what the paper's formula says: the square of each sample's
    gradient, which does not depend on the batch size. It selects in parameters with "layer" in their names, and trains
    all others whole: `include="*layer*"`, with the others in `dense=`. Its threshold takes every entry that ties with
    the last one; here there are exactly k. Its weight decay moves what is not selected; the optimizers of this package
    leave it alone.

    Args:
        model: left as it was found.
        data: batches with labels.
        names: the parameters to score.
        seed: not used.
        progress: show a bar.
        fisher: "sample" squares the gradient of each sample, "batch" that of each batch's mean loss.
        samples: how many to use, from the start of the data; None means all.
        max_norm: to which norm each tensor's batch gradient is clipped before it is squared; None leaves it as it is.
        loss: a function of (model, batch) that returns one loss a sample, in place of the head's own.

    Raises:
        TypeError: samples is not a whole number.
        ValueError: an option is out of range or belongs to the other kind of Fisher; no data; no labels.
    """
    _check(fisher, samples, max_norm)
    if fisher == "sample":
        scores = estimate_fisher(model, data, samples=samples, loss=loss, names=names, seed=seed, progress=progress)
        report = scores.report
        return scores, {"samples": report.samples, "dropped": report.dropped, "fallback": report.fallback}
    objective = Objective("empirical", loss, "mean", seed)
    sums = zeros(model, names)
    counted: list[int] = []

    def value(batch: Any, positions: list[int]) -> Tensor:
        counted.append(len(positions))
        return objective(model, batch, positions).outputs.mean()

    def take(name: str, grad: Tensor, count: int) -> None:
        grad = grad.float()
        if max_norm is not None:
            grad = grad * (max_norm / (torch.linalg.vector_norm(grad) + 1e-6)).clamp(max=1.0)
        sums[name].addcmul_(grad, grad)

    watched = first_samples(data, samples, progress=progress)
    used = for_each_gradient(model, watched, names, value, take)
    return {name: total.div_(len(counted)) for name, total in sums.items()}, {"samples": used}


def _check(fisher: str, samples: int | None, max_norm: float | None) -> None:
    check_count("samples", samples, or_all=True)
    if fisher not in ("sample", "batch"):
        raise ValueError(f'fisher must be "sample" or "batch", got {fisher!r}')
    if max_norm is not None and fisher == "sample":
        raise ValueError('max_norm clips gradients of batches: it goes with fisher="batch"')
    if max_norm is not None and not 0 < max_norm < math.inf:
        raise ValueError(f"max_norm must be positive, got {max_norm}")
