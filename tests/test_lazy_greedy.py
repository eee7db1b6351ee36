"""Subsets by greedy maximisation: against all subsets, against exact arithmetic, against plain greedy."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from sparseft import data
from sparseft.data import (
    ConditionalGain,
    FacilityLocation,
    PoolMutualInformation,
    QueryMutualInformation,
    lazy_greedy,
    plain_greedy,
)

pytest.importorskip("sparseft._C", reason="the C++ extension is not built")
KINDS = ("facility location", "pool information", "query information", "conditional gain")


def draw(generator, rows, columns, levels=None):
    """Similarities; with levels, of so few values that gains tie again and again, and none is rounded.

    Otherwise of twenty orders of magnitude: a sum in fp64 of numbers like those of torch.rand is hardly ever rounded.
    """
    if levels is None:
        return (8 * torch.randn(rows, columns, generator=generator)).exp()
    return torch.randint(0, levels, (rows, columns), generator=generator) / 8


def make(kind, generator, candidates, samples, levels=None, weight=0.75):
    similarity = draw(generator, candidates, samples, levels)
    other = draw(generator, 3, samples, levels)
    return {
        "facility location": lambda: FacilityLocation(similarity),
        "pool information": lambda: PoolMutualInformation(similarity, other, eta=weight),
        "query information": lambda: QueryMutualInformation(similarity, eta=weight),
        "conditional gain": lambda: ConditionalGain(similarity, other, nu=weight),
    }[kind]()


def exact_value(objective, subset):
    """The set function as the literature writes it, in exact arithmetic."""
    if not subset:
        return Fraction(0)
    rows = [[Fraction(value) for value in row] for row in objective.similarity.tolist()]
    best = [max(rows[c][r] for c in subset) for r in range(len(rows[0]))]
    if isinstance(objective, FacilityLocation):
        return sum(best)
    if isinstance(objective, QueryMutualInformation):
        return sum(best) + Fraction(objective.eta) * sum(max(rows[c]) for c in subset)
    pool = isinstance(objective, PoolMutualInformation)
    other = (objective.query if pool else objective.conditioning).tolist()
    limits = [
        Fraction(objective.eta if pool else objective.nu) * max(map(Fraction, row)) for row in zip(*other, strict=True)
    ]
    if pool:
        return sum(min(one, limit) for one, limit in zip(best, limits, strict=True))
    return sum(max(one - limit, 0) for one, limit in zip(best, limits, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_that_of_greedy_in_exact_arithmetic(kind, seed, threads):
    """Every gain is a multiple of 1/32, so neither is rounded; most picks are ties, which the lowest index wins."""
    objective = make(kind, torch.Generator().manual_seed(seed), 13, 9, levels=4)
    found = lazy_greedy(objective, 13)
    chosen, ties = [], 0
    for index, gain in zip(found.indices.tolist(), found.gains.tolist(), strict=True):
        before = exact_value(objective, chosen)
        gains = {c: exact_value(objective, [*chosen, c]) - before for c in range(13) if c not in chosen}
        best = max(gains.values())
        ties += sum(value == best for value in gains.values()) > 1
        assert index == min(c for c, value in gains.items() if value == best)
        assert gain == best
        chosen.append(index)
    assert ties


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_keeps_its_guarantee(kind):
    """Against the best of all subsets: at least 1 - 1/e of it; values are those of the definition."""
    for seed in range(4):
        objective = make(kind, torch.Generator().manual_seed(seed), 9, 7)
        for budget in (1, 3, 5):
            found = lazy_greedy(objective, budget)
            reached = exact_value(objective, found.indices.tolist())
            best = max(exact_value(objective, subset) for subset in itertools.combinations(range(9), budget))
            assert (1 - 1 / math.e) * best <= reached <= best
            assert float(found.gains.sum()) == pytest.approx(float(reached), rel=1e-6)
            assert objective.value(found.indices) == pytest.approx(float(reached), rel=1e-6)


@pytest.mark.parametrize("levels", [None, 3], ids=["distinct", "ties"])
@pytest.mark.parametrize(
    ("candidates", "samples", "budget"), [(400, 400, 120), (257, 31, 257), (33, 777, 9), (1, 1, 1)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_lazy_greedy_is_plain_greedy(kind, candidates, samples, budget, levels, threads):
    """Bit for bit, also once nothing can be gained any more."""
    objective = make(kind, torch.Generator().manual_seed(candidates), candidates, samples, levels)
    lazy, plain = lazy_greedy(objective, budget), plain_greedy(objective, budget)
    assert torch.equal(lazy.indices, plain.indices)
    assert torch.equal(lazy.gains, plain.gains)
    assert lazy.evaluations <= plain.evaluations
    assert bool((lazy.gains.diff() <= 0).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_with_costs_the_choice_is_that_of_exact_quotients(kind, seed, threads):
    """Gains and costs are small, so that quotients in fp64 differ where exact ones do, and tie where these do."""
    generator = torch.Generator().manual_seed(seed)
    objective = make(kind, generator, 13, 9, levels=4)
    costs = torch.randint(1, 8, (13,), generator=generator).tolist()
    for budget in (min(costs), 11, 17, sum(costs)):
        found = lazy_greedy(objective, budget, costs=costs)
        rest, chosen = budget, []
        while fitting := [c for c in range(13) if c not in chosen and costs[c] <= rest]:
            before = exact_value(objective, chosen)
            rates = {c: (exact_value(objective, [*chosen, c]) - before) / costs[c] for c in fitting}
            best = max(fitting, key=lambda c: (rates[c], -c))
            assert found.gains[len(chosen)] == float(rates[best] * costs[best])
            chosen.append(best)
            rest -= costs[best]
        assert found.indices.tolist() == chosen


def test_what_cannot_be_paid_for_is_passed_over():
    objective = FacilityLocation(torch.diag(torch.tensor([10.0, 3.0, 8.0])))
    costs = [5, 2, 4]  # of rates 2, 1.5 and 2
    for budget, wanted in ((2, [1]), (4, [2]), (6, [0]), (8, [0, 1]), (9, [0, 2]), (10, [0, 2]), (11, [0, 2, 1])):
        for greedy in (lazy_greedy, plain_greedy):
            assert greedy(objective, budget, costs=costs).indices.tolist() == wanted


@pytest.mark.parametrize("levels", [None, 3], ids=["distinct", "ties"])
@pytest.mark.parametrize(("candidates", "samples", "budget"), [(400, 400, 9_000), (257, 31, 1.0), (33, 777, 300)])
@pytest.mark.parametrize("kind", KINDS)
def test_lazy_greedy_is_plain_greedy_with_costs(kind, candidates, samples, budget, levels, threads):
    generator = torch.Generator().manual_seed(candidates)
    objective = make(kind, generator, candidates, samples, levels)
    costs = torch.randint(1, 200, (candidates,), generator=generator)
    lazy, plain = (greedy(objective, budget, costs=costs) for greedy in (lazy_greedy, plain_greedy))
    assert torch.equal(lazy.indices, plain.indices)
    assert torch.equal(lazy.gains, plain.gains)
    assert len(lazy.indices) == candidates or costs[lazy.indices].sum() <= budget
    ended = [greedy(objective, budget, costs=costs, stop_at_zero=True) for greedy in (lazy_greedy, plain_greedy)]
    assert torch.equal(ended[0].indices, ended[1].indices)
    assert bool((ended[0].gains > 0).all())


def test_equal_costs_are_none():
    objective = make("facility location", torch.Generator().manual_seed(0), 50, 20)
    wanted = lazy_greedy(objective, 7)
    for costs, budget in (([1] * 50, 7), (torch.full((50,), 3, dtype=torch.int32), 23), ([1] * 50, 0.14)):
        found = lazy_greedy(objective, budget, costs=costs)
        assert torch.equal(found.indices, wanted.indices)
        assert torch.equal(found.gains, wanted.gains)


@pytest.mark.parametrize(
    ("costs", "budget", "message"),
    [
        ([3, 4, 5, 0], 5, "at least 1, one for each of 4 candidates, got one of 0"),
        ([3, 4, 5], 5, r"one for each of 4 candidates, got \[3\]"),
        ([3, 4, 5, 6.0], 5, r"costs must be whole numbers, got torch\.float32"),
        ([True] * 4, 2, r"costs must be whole numbers, got torch\.bool"),
        ([3, 4, 5, 6], 2, "budget must be from 3 to the 18 that all candidates cost, got 2"),
        ([3, 4, 5, 6], 19, "budget must be from 3 to the 18 that all candidates cost, got 19"),
        ([3, 4, 5, 6], 1.5, "budget must lie in"),
    ],
)
def test_costs_that_are_none_are_refused(costs, budget, message):
    for greedy in (lazy_greedy, plain_greedy):
        with pytest.raises((TypeError, ValueError), match=message):
            greedy(FacilityLocation(torch.rand(4, 3)), budget, costs=costs)


def test_few_candidates_are_looked_at():
    """Samples around centres: after the first pass, a small part of what plain greedy evaluates."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(20, 8, generator=generator).repeat(30, 1) + 0.3 * torch.randn(600, 8, generator=generator)
    similarity = torch.exp(-torch.cdist(points, points))
    lazy, plain = lazy_greedy(FacilityLocation(similarity), 100), plain_greedy(FacilityLocation(similarity), 100)
    assert torch.equal(lazy.indices, plain.indices)
    assert lazy.evaluations < plain.evaluations / 5


def test_sums_that_tie_but_for_rounding_are_rounded_alike():
    """Rows that are permutations of each other: whatever their sums round to, both compare the same numbers."""
    generator = torch.Generator().manual_seed(0)
    row = draw(generator, 1, 1003)[0]
    similarity = torch.stack([row[torch.randperm(1003, generator=generator)] for _ in range(64)])
    assert len(similarity.double().sum(1).unique()) > 1, "nothing is rounded"
    lazy, plain = lazy_greedy(FacilityLocation(similarity), 20), plain_greedy(FacilityLocation(similarity), 20)
    assert torch.equal(lazy.indices, plain.indices)
    assert torch.equal(lazy.gains, plain.gains)


def test_a_duplicate_gains_nothing():
    similarity = torch.eye(6)[[0, 1, 1, 2, 1, 3]][:, [0, 1, 1, 2, 1, 3]]
    found = lazy_greedy(FacilityLocation(similarity), 6)
    assert found.indices.tolist() == [1, 0, 3, 5, 2, 4]
    assert found.gains.tolist() == [3, 1, 1, 1, 0, 0]
    ended = lazy_greedy(FacilityLocation(similarity), 6, stop_at_zero=True)
    assert ended.indices.tolist() == plain_greedy(FacilityLocation(similarity), 6, stop_at_zero=True).indices.tolist()
    assert ended.indices.tolist() == [1, 0, 3, 5]


def test_a_similarity_in_another_order_is_copied():
    similarity = torch.rand(40, 30, generator=torch.Generator().manual_seed(0))
    wanted = lazy_greedy(FacilityLocation(similarity), 10)
    turned = similarity.t().contiguous().t()
    assert not turned.is_contiguous()
    assert torch.equal(lazy_greedy(FacilityLocation(turned), 10).indices, wanted.indices)


def test_a_budget_may_be_a_share():
    objective = FacilityLocation(torch.rand(10, 4))
    assert len(lazy_greedy(objective, 0.35).indices) == 3
    assert len(lazy_greedy(objective, 0.01).indices) == 1
    assert len(lazy_greedy(objective, 1.0).indices) == 10
    assert len(lazy_greedy(FacilityLocation(torch.rand(100, 4)), 0.29).indices) == 29


@pytest.mark.parametrize("budget", [0, 11, -1, 0.0, 1.5, math.nan])
def test_a_budget_that_cannot_be_met_is_refused(budget):
    for greedy in (lazy_greedy, plain_greedy):
        with pytest.raises(ValueError, match="budget must"):
            greedy(FacilityLocation(torch.rand(10, 4)), budget)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.25], ids=str)
@pytest.mark.parametrize("place", [(0, 0), (69, 17), (33, 40)])
def test_a_similarity_that_is_none_is_refused(bad, place, threads):
    similarity = torch.rand(70, 41)
    similarity[place] = bad
    similarity[69, 40] = -1  # the first bad candidate is named
    with pytest.raises(ValueError, match=f"of candidate {place[0]} for sample {place[1]}; shift or clip"):
        lazy_greedy(FacilityLocation(similarity), 3)
    with pytest.raises(ValueError, match="finite and not negative"):
        plain_greedy(FacilityLocation(similarity), 3)
    with pytest.raises(ValueError, match="query must be finite and not negative"):
        PoolMutualInformation(torch.rand(5, 41), similarity)


def test_what_is_no_objective_is_refused():
    pool = torch.rand(4, 5)
    with pytest.raises(ValueError, match="an empty query or conditioning set"):
        PoolMutualInformation(pool, torch.empty(0, 5))
    with pytest.raises(ValueError, match="an empty query or conditioning set"):
        QueryMutualInformation(torch.empty(4, 0))
    with pytest.raises(ValueError, match="an empty query or conditioning set"):
        ConditionalGain(pool, torch.empty(0, 5))
    with pytest.raises(ValueError, match="a column for each of the 5 samples"):
        ConditionalGain(pool, torch.rand(2, 4))
    with pytest.raises(TypeError, match=r"must be float32, got torch\.float64"):
        FacilityLocation(pool.double())
    for weight in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="eta must be a positive number"):
            QueryMutualInformation(pool, eta=weight)
        with pytest.raises(ValueError, match="nu must be a positive number"):
            ConditionalGain(pool, pool, nu=weight)
    with pytest.raises(TypeError, match="budget must be a count"):
        lazy_greedy(FacilityLocation(pool), True)


def test_negative_utilities_are_shifted_together_or_clipped():
    one, other = torch.tensor([[0.5, -1.0]]), torch.tensor([[-2.0, 3.0]])
    shifted = data.nonnegative(one, other)
    assert [part.tolist() for part in shifted] == [[[2.5, 1.0]], [[0.0, 5.0]]]
    clipped = data.nonnegative(one, other, how="clip")
    assert [part.tolist() for part in clipped] == [[[0.5, 0.0]], [[0.0, 3.0]]]
    assert data.nonnegative(one.abs())[0].tolist() == [[0.5, 1.0]]
    with pytest.raises(ValueError, match="must be finite"):
        data.nonnegative(one, torch.tensor([[math.nan]]))
    with pytest.raises(ValueError, match='"shift" or "clip"'):
        data.nonnegative(one, how="drop")
