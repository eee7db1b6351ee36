"""Which samples and which entries a halving keeps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparseft import ops  # noqa: F401  (registers torch.ops.sparseft)


def halved(count: int, least: int) -> int:
    """Return half of a count, rounded up, but no less than `least`, and no more than the count."""
    return min(count, max(least, -(-count // 2)))


def best_samples(
    scores: Mapping[int, float], count: int, *, lowest: bool = False, classes: Mapping[int, int] | None = None
) -> list[int]:
    """Return the positions of the `count` samples with the largest scores, ascending; ties go to the first.

    lowest: with the smallest ones instead. classes: keep the same share of every class, rounded in favour of what
    would come next without classes.
    """
    ranked = sorted(scores, key=lambda position: (scores[position] if lowest else -scores[position], position))
    if classes is not None:
        sizes: dict[int, int] = {}
        for position in ranked:
            sizes[classes[position]] = sizes.get(classes[position], 0) + 1
        seen = dict.fromkeys(sizes, 0)
        share = {}
        for position in ranked:
            share[position] = seen[classes[position]] / sizes[classes[position]]
            seen[classes[position]] += 1
        # sorting is stable: samples at the same share of their class keep their order
        ranked.sort(key=lambda position: share[position])
    return sorted(ranked[:count])


def best_entries(sums: Tensor, groups: Sequence[int], counts: Sequence[int], *, lowest: bool = False) -> Tensor:
    """Return where the largest sums are, `counts[g]` of group g: int64, ascending; ties go to the first.

    sums: fp32 [k], group after group; groups: their sizes. lowest: where the smallest ones are instead.
    """
    kept, first = [], 0
    for part, count in zip((-sums if lowest else sums).split(list(groups)), counts, strict=True):
        if count:
            indices, _ = torch.ops.sparseft.topk_indices([part], count)
            kept.append(indices.long() + first)
        first += len(part)
    return torch.cat(kept)


def capped(scores: Mapping[int, float], cap: float | None) -> tuple[dict[int, float], dict[int, float]]:
    """Return the weights that bring every score to at most `cap` times the median one, those below 1; and the scores.

    What was above is exactly equal after that, so that rounding does not rank it.
    """
    most = math.inf if cap is None else cap * statistics.median(scores.values())
    weights = {position: most / score for position, score in scores.items() if score > most}
    return weights, {position: min(score, most) for position, score in scores.items()}
