"""Cheaper kernels than utility: how alike samples are in their embeddings, or in their gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparseft.fisher import sample_gradients

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ROWS = 4096  # of the kernel, computed at a time


def embedding_kernel(examples: Tensor | NDArray[Any], targets: Tensor | NDArray[Any] | None = None) -> Tensor:
    """Return (1 + cosine) / 2 of each example's embedding and each target's, fp32 [examples, targets], on the CPU.

    An embedding of zeros has a cosine of 0 with every other, itself included.

    Args:
        examples: floating point [examples, features], of any model, in torch or numpy.
        targets: [targets, features]; by default the examples.

    Raises:
        TypeError: they are not of floating point, or neither of torch nor of numpy.
        ValueError: not matrices of as many features, or not finite.
    """
    examples = _tensor("examples", examples)
    targets = examples if targets is None else _tensor("targets", targets)
    for name, embeddings in (("examples", examples), ("targets", targets)):
        if not embeddings.is_floating_point():
            raise TypeError(f"{name} must be of floating point, got {embeddings.dtype}; convert with .float()")
        if embeddings.dim() != 2 or not embeddings.numel() or embeddings.shape[1] != examples.shape[1]:
            raise ValueError(
                f"examples and targets must be [samples, features] of as many features, got {list(examples.shape)} "
                f"and {list(targets.shape)}"
            )
        bad = (~embeddings.isfinite().all(1)).nonzero()[:, 0].tolist()
        if bad:
            raise ValueError(f"embeddings must be finite, those of {name} {bad[:5]} are not; leave these out")
    left, right = (torch.nn.functional.normalize(_scaled(part), dim=1) for part in (examples, targets))
    kernel = torch.empty(len(left), len(right))
    for start in range(0, len(left), _ROWS):
        kernel[start : start + _ROWS] = left[start : start + _ROWS] @ right.T
    return kernel.add_(1).div_(2).clamp_(0, 1)


def fisher_kernel(
    model: nn.Module,
    examples: Iterable[Any],
    targets: Iterable[Any] | None = None,
    *,
    indices: Mapping[str, Tensor],
    squared: bool = False,
    **options: Any,
) -> Tensor:
    """Return (1 + cosine) / 2 of samples' gradients at chosen entries, fp32 [examples, targets], on the CPU.

    Samples whose gradients point the same way teach a model the same. Entries of a mask are what training will change;
    a few thousand tell samples apart. Memory is that of `sample_gradients`: samples x entries x 8 bytes.

    Args:
        model: as for `estimate_fisher`; left as it was found.
        examples: batches with labels, in a fixed order.
        targets: batches; by default the examples.
        indices: parameter name -> chosen entries: a Mask, for instance.
        squared: compare squared gradients, each sample's term of the Fisher information: which weights matter to it,
            whichever way they should go.
        options: of `sample_gradients`, for instance samples, mode and loss.

    Raises:
        ValueError: a sample has no finite gradient, which leaves a row of the kernel without meaning; what
            `sample_gradients` refuses.
    """
    rows = [
        _gradients(name, model, data, indices, squared, options)
        for name, data in (("examples", examples), ("targets", targets))
        if data is not None
    ]
    return embedding_kernel(rows[0], rows[-1])


def _gradients(
    name: str,
    model: nn.Module,
    data: Iterable[Any],
    indices: Mapping[str, Tensor],
    squared: bool,
    options: Mapping[str, Any],
) -> Tensor:
    found = sample_gradients(model, data, indices, squared=squared, **options)
    if found.report.dropped:
        raise ValueError(
            f"every sample must have a finite gradient, {name} {found.report.dropped[:5]} have none; leave these out"
        )
    return found.columns


def _tensor(name: str, embeddings: Tensor | NDArray[Any]) -> Tensor:
    if not hasattr(embeddings, "shape"):
        raise TypeError(f"{name} must be a matrix of torch or numpy, got {type(embeddings).__name__}")
    return torch.as_tensor(embeddings)


def _scaled(embeddings: Tensor) -> Tensor:
    """Return fp32 rows whose largest entry is 1: squares of very small or large ones would be lost."""
    rows = embeddings.detach().double()
    largest = rows.abs().amax(1, keepdim=True)
    return (rows / largest.masked_fill(largest == 0, 1)).float()
