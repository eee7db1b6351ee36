"""What the experts of a mixture contribute to the per-sample gradients of their weights, and how that becomes Fisher.

A weight [G, A, B] is a stack of matrices, and each row of the layer's input meets one of them. Rows are sorted by
matrix, then by sample; a run of rows of one matrix and one sample is a segment.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseft import ops  # noqa: F401  (registers torch.ops.sparseft)


@dataclass
class Grouped:
    """A use of stacked matrices: `grad[n, g] = sum of left[m, :] outer right[m, :] over the rows m of segment (g, n)`.

    samples: N; left: [M, A]; right: [M, B], for a parameter [G, A, B]; segment: int64 [M], g * N + n of each row,
    ascending.
    """

    samples: int
    left: Tensor
    right: Tensor
    segment: Tensor

    def reaches(self) -> Tensor:
        """Return which samples get a nonzero gradient: bool [N]."""
        # 0 * inf leaves NaN in rows that no gradient reaches
        row = torch.nan_to_num(self.left, 0.0).ne(0).any(1) & torch.nan_to_num(self.right, 0.0).ne(0).any(1)
        count = row.new_zeros(self.samples, dtype=torch.int64)
        return count.index_add_(0, self.segment % self.samples, row.long()).ne(0)

    def at(self, indices: Tensor) -> Tensor:
        """Return the per-sample gradients at chosen entries, flat positions in [G, A, B], ascending: fp32 [N, k]."""
        size = self.left.shape[1] * self.right.shape[1]
        groups, counts = torch.unique_consecutive(indices.long() // size, return_counts=True)
        parts = indices.long().split(counts.tolist())
        found = [
            torch.ops.sparseft.outer_at(*self._padded(group), part - group * size)
            for group, part in zip(groups.tolist(), parts, strict=True)
        ]
        return torch.cat(found, 1) if found else torch.zeros(self.samples, 0, device=indices.device)

    def _padded(self, group: int) -> tuple[Tensor, Tensor]:
        """Return the rows of one group as those of a linear layer, padded with zeros: [N, T, A] and [N, T, B]."""
        bounds = torch.arange(self.samples + 1, device=self.segment.device) + group * self.samples
        offsets = torch.searchsorted(self.segment, bounds)
        own = slice(int(offsets[0]), int(offsets[-1]))
        sample = self.segment[own] - group * self.samples
        place = torch.arange(own.start, own.stop, device=sample.device) - offsets[sample]
        longest = int(offsets.diff().max())
        left, right = _without_doubles(self.left[own], self.right[own])
        padded_left = left.new_zeros(self.samples, longest, left.shape[1])
        padded_right = right.new_zeros(self.samples, longest, right.shape[1])
        padded_left[sample, place], padded_right[sample, place] = left, right
        return padded_left, padded_right


def add_grouped_(fisher: Tensor, uses: list[Grouped], scores: Tensor | None = None) -> None:
    """Add the squared per-sample gradients of all uses of stacked matrices to fisher [G, A, B].

    scores: fp32 [N], to which they are added too, summed over all entries of each sample. That goes matrix by matrix:
    a launch for all of them has no scores.
    """
    samples, groups = uses[0].samples, len(fisher)
    left, right, segment = _joined(uses)
    if scores is not None:
        whole = Grouped(samples, left, right, segment)
        for group in range(groups):
            dy, x = whole._padded(group)
            torch.ops.sparseft.fisher_linear_(fisher[group], x, dy, None, scores)
        return
    bounds = torch.arange(groups * samples + 1, device=segment.device)
    offsets = torch.searchsorted(segment, bounds)
    torch.ops.sparseft.fisher_segments_(fisher, right, left, offsets, bounds[:-1] // samples)


def sum_segments(rows: Tensor, segment: Tensor, groups: int, samples: int) -> Tensor:
    """Return the sums of rows [M, A] over each segment, sample after sample: fp32 [N, G * A]."""
    # the backward of an embedding is a sum of rows by index: parallel on a CPU, without atomics on a GPU
    sums: Tensor = torch.ops.aten.embedding_dense_backward(rows.float(), segment, groups * samples, -1, False)
    return sums.view(groups, samples, rows.shape[1]).transpose(0, 1).reshape(samples, -1)


def _joined(uses: list[Grouped]) -> tuple[Tensor, Tensor, Tensor]:
    """Return left, right and segment of all uses as of one, in dtypes that squares are taken of."""
    if len(uses) == 1:
        left, right, segment = uses[0].left, uses[0].right, uses[0].segment
    else:
        segment, order = torch.cat([use.segment for use in uses]).sort(stable=True)
        left = torch.cat([use.left for use in uses])[order]
        right = torch.cat([use.right for use in uses])[order]
    return *_without_doubles(left, right), segment


def _without_doubles(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    return (left.float(), right.float()) if left.dtype == torch.float64 else (left, right)
