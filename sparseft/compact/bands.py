"""Whole rows, columns and blocks of a matrix: their gradient is a dense product or a few, all of whose entries count.

Rows that follow each other in the index list and have entries in the same columns are a band. Selected rows are one
band, and so are selected columns; blocks are some. What a band's rows and columns multiply to is a piece of the leaf's
gradient, in list order already.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sparseft.products import weight_gradient

# One band takes no more time than its entries one by one, whatever its size. Several take less from so many entries on
# for each row and column that is copied, which blocks of 96 x 96 have. With AVX-512, those of 64 are slower by half on
# two threads and faster by a sixth on one, those of 128 faster on both.
_ENTRIES_A_LINE = 48
# a GPU starts three kernels a band, and a compiled graph holds them all
_MOST_BANDS = {"cpu": 64, "cuda": 8}


class Bands(NamedTuple):
    """The selected entries of a matrix as products of rows and columns.

    Attributes:
        spans: the rows of the first band, its columns, the rows of the next one, and so on: the first of them and
            how many there are, if they lie side by side; -1 and how many, if not.
        lines: int64: rows and columns that do not lie side by side, in the same order.
    """

    spans: tuple[tuple[int, int], ...]
    lines: Tensor

    @classmethod
    def of(cls, rows: Tensor, columns: Tensor, shape: tuple[int, int]) -> Bands | None:
        """Return the bands of some entries, or None where a product an entry takes less time.

        rows, columns: int64 [k], where the entries lie in a matrix of this shape, in C order.
        """
        if not len(rows):
            return None
        heads, counts = rows.unique_consecutive(return_counts=True)
        begins = _beginnings(columns, counts)
        if len(begins) > _MOST_BANDS.get(rows.device.type, 1):
            return None
        firsts = (counts.cumsum(0) - counts)[begins].tolist()
        lines: list[Tensor] = []
        for (begin, end), first in zip(itertools.pairwise([*begins.tolist(), len(heads)]), firsts, strict=True):
            lines += [heads[begin:end], columns[first : first + int(counts[begin])]]
        copied = sum(len(line) for line, most in zip(lines, itertools.cycle(shape), strict=False) if len(line) < most)
        if len(begins) > 1 and len(rows) < _ENTRIES_A_LINE * copied:
            return None
        spans = tuple(_span(line) for line in lines)
        scattered = [line for line, (first, _) in zip(lines, spans, strict=True) if first < 0]
        return cls(spans, torch.cat([rows[:0], *scattered]))


def gradient(left: Tensor, right: Tensor, bands: Bands) -> Tensor:
    """Return the entries of left.T @ right that lie in bands: fp32 [k].

    left: [M, rows]; right: [M, columns]; one dtype, fp32, bf16 or fp16.
    """
    scattered = iter(bands.lines.split([count for first, count in bands.spans if first < 0]))
    products = [
        weight_gradient(_take(left, rows, scattered), _take(right, columns, scattered)).view(-1)
        for rows, columns in zip(bands.spans[::2], bands.spans[1::2], strict=True)
    ]
    return products[0] if len(products) == 1 else torch.cat(products)


def _take(features: Tensor, span: tuple[int, int], scattered: Iterator[Tensor]) -> Tensor:
    first, count = span
    return features.index_select(1, next(scattered)) if first < 0 else features[:, first : first + count]


def _span(line: Tensor) -> tuple[int, int]:
    first, last = int(line[0]), int(line[-1])
    return (first if last - first + 1 == len(line) else -1), len(line)


def _beginnings(columns: Tensor, counts: Tensor) -> Tensor:
    """Return which rows begin a band, of those that have entries: int64, sorted.

    columns: int64 [k], in C order; counts: int64, how many of them each row has.
    """
    before = counts.roll(1)
    begins = counts != before
    row = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    # where the row before has as many entries, the one above is as far back
    above = torch.arange(len(columns), device=counts.device) - before[row]
    begins[row[columns != columns[above.clamp_(min=0)]]] = True
    begins[0] = True
    return begins.nonzero().flatten()
