"""The largest of scores that stay in their files, exactly, in three reads and the memory of a few blocks.

A radix select over the bits of the scores, as `topk_indices` is one. Scores become 32-bit integers of the same order.
The first read counts their upper halves, which says in which of 65,536 bins the last one selected lies; the second
counts the lower halves in that bin, which says which number it is; the third writes positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparseft.index_lists import index_dtype
from sparseft.selection.arguments import check_finite
from sparseft.selection.score_files import StoredScore

_BINS = 1 << 16


class Selected(NamedTuple):
    """What was selected.

    Attributes:
        indices: parameter name -> positions, of the parameters whose group got an entry.
        highest: the largest score of all.
        lowest: the smallest score selected, and the name of the first parameter, by name, in which it was.
    """

    indices: dict[str, Tensor]
    highest: float
    lowest: tuple[float, str]


def largest_stored(scores: Mapping[str, StoredScore], grouped: Iterable[tuple[list[str], int]]) -> Selected:
    """Return where the largest scores of each group are, ties going to the lowest (parameter, index).

    Args:
        scores: parameter name -> scores.
        grouped: the parameters of each group, and how many of its entries to select.

    Raises:
        ValueError: scores are not finite.
        RuntimeError: a file was changed meanwhile.
    """
    found: dict[str, Tensor] = {}
    highest, lowest = -math.inf, (math.inf, "")
    for names, count in grouped:
        group = {name: scores[name] for name in names}
        uppers, high = _survey(group)
        highest = max(highest, high)
        if not count:
            continue
        bar, ties = _bar(group, uppers, count)
        # one list for all: small ones, made block by block, would come to lie in the gaps that larger ones need again
        rest = torch.empty(count, dtype=index_dtype(max(score.numel() for score in group.values())))
        for name, score in group.items():
            size, ties, low = _write_reaching(rest, score, bar, ties)
            found[name], rest = rest[:size], rest[size:]
            lowest = min(lowest, (low, name))
    return Selected({name: found[name] for name in scores if name in found}, highest, lowest)


def _survey(group: Mapping[str, StoredScore]) -> tuple[Tensor, float]:
    """Return how many keys have each upper half, int64 [65536], and the largest score."""
    counts = torch.zeros(_BINS, dtype=torch.int64)
    ends: dict[str, tuple[float, float]] = {}
    for name, score in group.items():
        extremes: list[float] = []
        for _, block in score.blocks():
            extremes += map(float, block.aminmax())
            counts += torch.bincount((_keys(block) >> 16) + _BINS // 2, minlength=_BINS)
        ends[name] = float(np.min(extremes)), float(np.max(extremes))
    check_finite(ends)
    return counts, max(high for _, high in ends.values())


def _bar(group: Mapping[str, StoredScore], uppers: Tensor, k: int) -> tuple[int, int]:
    """Return the k-th largest key, and how many of the keys equal to it are among the k."""
    place, rank = _bin_of(uppers, k)
    upper = place - _BINS // 2
    counts = torch.zeros(_BINS, dtype=torch.int64)
    for score in group.values():
        for _, block in score.blocks():
            keys = _keys(block)
            inside = keys[_where(keys >> 16 == upper)]
            counts += torch.bincount(inside & (_BINS - 1), minlength=_BINS)
    lower, rank = _bin_of(counts, rank)
    return upper * _BINS + lower, rank


def _bin_of(counts: Tensor, rank: int) -> tuple[int, int]:
    """Return the bin in which the rank-th largest lies, and its rank there."""
    reached = counts.flip(0).cumsum(0)
    above = int((reached < rank).sum())
    return _BINS - 1 - above, rank - (int(reached[above - 1]) if above else 0)


def _write_reaching(indices: Tensor, score: StoredScore, bar: int, ties: int) -> tuple[int, int, float]:
    """Write where keys are above the bar or among the first `ties` on it.

    Returns how many these are, how many ties are left, and the least of their scores.
    """
    size, least = 0, math.inf
    for first, block in score.blocks():
        keys = _keys(block)
        places = _where(keys >= bar)
        tied = keys[places] == bar
        places = places[~tied | (tied.cumsum(0) <= ties)]
        ties -= min(ties, int(tied.sum()))
        if places.numel():
            least = min(least, float(block[places].min()))
            indices[size : size + places.numel()] = places + first
            size += places.numel()
    return size, ties, least


def _keys(block: Tensor) -> Tensor:
    """Return scores, fp32, as int32 of the same order; -0.0 and 0.0 are a tie."""
    bits = block.view(torch.int32)
    sign = bits >> 31
    return (bits & 0x7FFFFFFF).bitwise_xor_(sign).sub_(sign)


def _where(mask: Tensor) -> Tensor:
    # several times as fast as torch's nonzero and masked_select where little is true
    return torch.from_numpy(np.flatnonzero(mask.numpy()))
