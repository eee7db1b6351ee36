"""Exact lazy greedy of facility location against plain greedy, each gain of every candidate computed at every pick.

Floor: one read of the similarity.
"""

import harness
import pytest
import torch

from sparseft import data

# similarity of what, samples, how many of them are chosen: 30 %, as the method's paper does
CASES = [("clusters", 5000, 1500), ("uniform noise", 5000, 1500)]
CHECKED = 150  # picks; those of a smaller budget are the first of a larger one


@pytest.mark.parametrize(("kind", "n", "budget"), CASES)
def test_lazy_greedy(compare, kind, n, budget):
    objective = data.FacilityLocation(similarity(kind, n))
    found = data.lazy_greedy(objective, budget)
    assert torch.equal(found.indices[:CHECKED], plain_greedy(objective.similarity, CHECKED))
    compare(
        harness.Case("lazy_greedy", f"{budget:,} of {n:,} samples, {kind}", budget / n),
        lambda: data.lazy_greedy(objective, budget),
        {"plain greedy, torch": lambda: plain_greedy(objective.similarity, budget)},
        rounds=2,
        floor=harness.Floor(moved=4 * n * n),
    )


def similarity(kind, n):
    """Return cosines of points around 200 centres, shifted to [0, 1], or uniform noise, the hardest for bounds."""
    generator = torch.Generator().manual_seed(0)
    if kind == "uniform noise":
        return torch.rand(n, n, generator=generator)
    points = torch.randn(200, 64, generator=generator).repeat(n // 200, 1) + torch.randn(n, 64, generator=generator)
    points = torch.nn.functional.normalize(points, dim=1)
    return ((points @ points.T + 1) / 2).clamp_min(0)


def plain_greedy(similarity, budget):
    """As one would write it: two vectorised operations a pick, in memory that is allocated once."""
    covered, more = torch.zeros(similarity.shape[1]), torch.empty_like(similarity)
    left, chosen = torch.zeros(len(similarity)), []
    for _ in range(budget):
        torch.sub(similarity, covered, out=more)
        best = int(more.clamp_min_(0).sum(1).add_(left).argmax())
        left[best] = -torch.inf
        covered = torch.maximum(covered, similarity[best])
        chosen.append(best)
    return torch.tensor(chosen)
