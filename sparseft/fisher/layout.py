"""Where the samples of a batch lie in a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from torch import Tensor


class Layout(Enum):
    """How the samples of a batch lie in the leading dimensions of an operation."""

    BATCH = auto()  # [N, ...]
    FLAT = auto()  # [N * r, ...], sample after sample
    SECOND = auto()  # [T, N, ...]
    INTERLEAVED = auto()  # [T * N, ...], the tokens of a time-major batch
    ALONE = auto()  # no batch dimension: the same for every sample


@dataclass(frozen=True)
class Rows:
    """A block of rows of a parameter, of `width` entries each."""

    start: int
    stop: int
    width: int


def fits(layout: Layout | None, sizes: tuple[int, ...], samples: int) -> bool:
    """Return whether N samples can lie so in a tensor whose leading sizes are given."""
    if layout is Layout.ALONE:
        return True
    if layout is Layout.BATCH:
        return sizes[0] == samples
    if layout is Layout.SECOND:
        return len(sizes) > 1 and sizes[1] == samples
    return layout is not None and sizes[0] > 0 and sizes[0] % samples == 0


def by_sample(tensor: Tensor, layout: Layout, samples: int) -> Tensor:
    """Return a tensor as [N, r, ...], with what the layout does not name in front as r; [1, ...] if it lies alone."""
    if layout is Layout.SECOND:
        return tensor.transpose(0, 1)
    if layout is Layout.INTERLEAVED:
        return tensor.reshape(-1, samples, *tensor.shape[1:]).transpose(0, 1)
    if layout is Layout.ALONE:
        return tensor.unsqueeze(0)
    return tensor.reshape(samples, -1, *tensor.shape[1:])
