"""What a convolution contributes to the per-sample gradients of its weight, and how that becomes Fisher.

A convolution is a linear layer over the patches of its input, so its weight's gradient is that of a linear layer whose
tokens are the output's positions. Unfolding repeats the input once for every element of the kernel. It is therefore
done late and for few samples at a time, or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseft import ops  # noqa: F401  (registers torch.ops.sparseft)

_SLICE = 1 << 18  # elements of a weight whose gradient stays in the cache until it is squared
_UNFOLDED = 1 << 25  # elements that unfolding may make at a time


@dataclass(frozen=True)
class Window:
    """How a kernel moves over an image: a convolution's stride, padding and dilation along each axis, its groups."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


@dataclass
class Patches:
    """A convolutional use: `grad[a, b, k] = sum_p left[a, p] * image[b, stride * p + dilation * k - padding]`.

    The sum is over the positions p of all r rows of a sample; b counts within the group of a.

    samples: N; left: [N * r, A, *positions]; image: [N * r, B * groups, *size], for a parameter [A, B, *kernel];
    (dy, x) of a convolution, (x, dy) of a transposed one.
    """

    samples: int
    left: Tensor
    image: Tensor
    kernel: tuple[int, ...]
    window: Window

    @property
    def positions(self) -> int:
        """How many positions a sample has."""
        return self.left[0, 0].numel() * (len(self.left) // self.samples)

    def reaches(self) -> Tensor:
        """Return which samples get a nonzero gradient: bool [N]."""
        return self._any(self.left) & self._any(self.image)

    def at(self, indices: Tensor) -> Tensor:
        """Return the per-sample gradients at chosen entries, flat positions in [A, B, *kernel]: fp32 [N, k]."""
        return torch.stack([self.gradient(sample).flatten()[indices.long()] for sample in range(self.samples)])

    def gradient(self, sample: int) -> Tensor:
        """Return the gradient of one sample: fp32 [A, B, *kernel]."""
        rows = len(self.left) // self.samples
        own = slice(sample * rows, (sample + 1) * rows)
        left, image = self.left[own].float(), self.image[own].float()
        window, axes = self.window, len(self.kernel)
        # of the weight, only the shape is looked at
        weight = left.new_empty(1).expand(left.shape[1], image.shape[1] // window.groups, *self.kernel)
        grad: Tensor = torch.ops.aten.convolution_backward(
            left,
            image,
            weight,
            None,
            window.stride,
            window.padding,
            window.dilation,
            False,
            [0] * axes,
            window.groups,
            [False, True, False],
        )[1]
        return grad

    def unfolded(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Return samples first..last as those of a linear layer, T positions each: [n, T, A], [n, T, B * groups * K].

        K is the number of the kernel's elements. A row of the weight meets its own group's columns only.
        """
        rows, axes = len(self.left) // self.samples, len(self.kernel)
        own = slice(first * rows, last * rows)
        left, view = self.left[own], self.image[own]
        if any(self.window.padding):
            view = F.pad(view, [size for padding in reversed(self.window.padding) for size in (padding, padding)])
        for axis, kernel in enumerate(self.kernel):
            dilation = self.window.dilation[axis]
            view = view.unfold(2 + axis, dilation * (kernel - 1) + 1, self.window.stride[axis])[..., ::dilation]
        view = view.movedim(1, 1 + axes)  # [n * r, *positions, B * groups, *kernel]
        samples = last - first
        return (
            left.flatten(2).transpose(1, 2).reshape(samples, -1, left.shape[1]),
            view.reshape(samples, -1, prod(view.shape[1 + axes :])),
        )

    def _any(self, tensor: Tensor) -> Tensor:
        # 0 * inf leaves NaN in rows that no gradient reaches
        return torch.nan_to_num(tensor.reshape(self.samples, -1), 0.0).ne(0).any(1)


def add_patches_(fisher: Tensor, uses: list[Patches], scores: Tensor | None = None) -> None:
    """Add the squared per-sample gradients of a parameter's convolutional uses to fisher [A, B, *kernel].

    scores: fp32 [N], to which they are added too, summed over all entries of each sample.
    """
    if fisher.is_cuda:
        add_unfolded_(fisher, uses, scores)
    else:
        add_by_sample_(fisher, uses, scores)


def add_by_sample_(
    fisher: Tensor, uses: list[Patches], scores: Tensor | None = None, *, elements: int = _SLICE
) -> None:
    """Do so with one ordinary weight gradient a sample, for about so many elements of the weight at a time.

    On a CPU this is the fastest way by far: unfolding costs more than the convolution, and a call costs little.
    """
    rows = len(fisher)
    # a slice of the rows would not lie group by group
    step = rows if any(use.window.groups > 1 for use in uses) else max(16, elements // fisher[0].numel())
    for first in range(0, rows, step):
        part = fisher[first : first + step]
        own = [replace(use, left=use.left[:, first : first + step]) for use in uses]
        for sample in range(uses[0].samples):
            grads = [use.gradient(sample) for use in own]
            grad = sum(grads[1:], grads[0])
            part.addcmul_(grad, grad)
            if scores is not None:
                scores[sample] += grad.square_().sum()


def add_unfolded_(
    fisher: Tensor, uses: list[Patches], scores: Tensor | None = None, *, elements: int = _UNFOLDED
) -> None:
    """Do so with the patches of a few samples at a time, about so many elements: on a GPU it is launches that cost.

    Where a group has no more rows than positions, the gradients themselves are no larger than the patches, and one
    batched product makes those of all the samples at hand. Else, and without groups, they are never formed.
    """
    rows, columns = fisher.shape[0], fisher[0].numel()
    samples, groups = uses[0].samples, {use.window.groups for use in uses}
    formed = groups != {1} or rows <= min(use.positions for use in uses)
    size = sum(use.positions * columns * use.window.groups for use in uses)
    chunk = max(1, elements // max(size, rows * columns if formed else 1))
    for first in range(0, samples, chunk):
        last = min(first + chunk, samples)
        parts = [use.unfolded(first, last) for use in uses]
        own = None if scores is None else scores[first:last]
        if formed:
            grads = [_gradients(*part, use.window.groups) for part, use in zip(parts, uses, strict=True)]
            squares = sum(grads[1:], grads[0]).square_()
            fisher += squares.sum(0).view(fisher.shape)
            if own is not None:
                own += squares.sum((1, 2))
        else:
            left, right = (_joined(part) for part in zip(*parts, strict=True))
            torch.ops.sparseft.fisher_linear_(fisher.view(rows, columns), right, left, None, own)


def _gradients(left: Tensor, right: Tensor, groups: int) -> Tensor:
    """Return the gradients [n, A, B * K], fp32, of what `unfolded` returned."""
    samples, positions, rows = left.shape
    left = left.float().view(samples, positions, groups, -1).permute(0, 2, 3, 1).flatten(0, 1)
    right = right.float().view(samples, positions, groups, -1).transpose(1, 2).flatten(0, 1)
    return torch.bmm(left, right).view(samples, rows, -1)


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return joined.float() if joined.dtype == torch.float64 else joined
