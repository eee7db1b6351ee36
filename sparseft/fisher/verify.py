"""Trust, checked: the captured pass against the loop of single samples, on a few samples of the caller's own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sparseft.fisher.batches import Batch, limited
from sparseft.fisher.engine import estimate_fisher
from sparseft.fisher.loop import batch_one_fisher
from sparseft.fisher.parameters import unwrapped
from sparseft.fisher.sample_dim import SampleDim


def verify(
    model: nn.Module,
    data: Iterable[Batch],
    *,
    samples: int = 3,
    tolerance: float | None = None,
    **options: Any,
) -> dict[str, float]:
    """Compare `estimate_fisher` with the loop of single samples, parameter by parameter, on a few samples.

    Worth its minute for a model of a new kind. The error of a parameter is its largest difference, relative to its own
    largest score, or to what rounding makes of a zero in a model of such scores: some gradients (of a key's bias) are
    zero but for rounding.

    Args:
        model: that of `estimate_fisher`.
        data: that of `estimate_fisher`.
        samples: how many samples to compare.
        tolerance: the largest error allowed; by default 1e-4, and ten units of rounding in half precision, also where
            it is autocast that computes in it.
        options: the arguments of `estimate_fisher` that say what is scored: mode, loss, names and the like.

    Returns:
        Parameter name -> error.

    Raises:
        RuntimeError: an error is above the tolerance; the message names the parameters.
    """
    parameters = dict(unwrapped(model).named_parameters())
    turned = SampleDim(options.get("batch_dim"))
    batches = [turned.back(batch) for batch, _ in limited(data, samples, turned.first)]
    fused = estimate_fisher(model, batches, samples=samples, progress=False, **options)
    plain = batch_one_fisher(model, batches, samples=samples, **options)
    dtypes = [parameters[name].dtype for name in plain]
    if "autocast" in fused.report.settings:
        dtypes.append(getattr(torch, str(fused.report.settings["autocast"])))
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    tolerance = max(1e-4, 10 * eps) if tolerance is None else tolerance
    floor = min(1e4 * eps**2, 1e-3) * max(float(scores.max()) for scores in plain.values())
    errors = {
        name: float((fused[name] - scores).abs().max()) / max(float(scores.max()), floor, 1e-38)
        for name, scores in plain.items()
    }
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    if wrong:
        worst = sorted(wrong, key=lambda name: -wrong[name])
        listed = ", ".join(f"{name} ({wrong[name]:.1e}, {fused.report.rules[name]})" for name in worst[:10])
        raise RuntimeError(
            f"{len(wrong)} of {len(errors)} parameters differ from the loop of single samples by more than "
            f"{tolerance:.1e}: {listed}; leave them out with `names`, or use `batch_one_fisher`"
        )
    return errors
