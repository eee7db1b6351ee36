"""Choosing a subset greedily: the candidate of largest gain, again and again, the lowest of those that tie.

For a monotone submodular function the value reached is at least 1 - 1/e of the best there is. With costs it is the
candidate of largest gain for its cost, without such a guarantee: after a cheap one, a far better one may not fit.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparseft.data.objectives import Coverage, Objective

_LANES = 16  # as in csrc/host/lazy_greedy.cpp


class Greedy(NamedTuple):
    """What greedy maximisation chose.

    Attributes:
        indices: int64 [k], rows of the similarity, in the order in which they were chosen.
        gains: fp64 [k], what each added to the objective; without costs they never increase.
        evaluations: how many gains were computed.
    """

    indices: Tensor
    gains: Tensor
    evaluations: int


def lazy_greedy(
    objective: Objective,
    budget: int | float,
    *,
    costs: Sequence[int] | Tensor | None = None,
    stop_at_zero: bool = False,
) -> Greedy:
    """Maximise an objective, evaluating only the candidates whose earlier gain leaves room for being the best.

    The choice is that of `plain_greedy`, bit for bit, for any number of threads. Beside the similarity it needs memory
    for a few numbers a candidate and a sample; one that is not contiguous, or not on the CPU, is copied.

    Args:
        objective: of sparseft.data.objectives. The candidates are the rows of its similarity.
        budget: how many to choose, or a float in (0, 1], the share of the candidates, rounded down but at least one.
            With costs: the most that the chosen ones may cost together, or the share of what all do, rounded down
            but at least what the cheapest does.
        costs: whole numbers of at least 1, one a candidate: tokens, for instance. Then each choice is the candidate
            with the largest gain / cost, in fp64, among those that what is left of the budget pays for, the lowest
            of those that tie, until it pays for none.
        stop_at_zero: end where no candidate gains anything. If not, the lowest ones fill the budget.

    Raises:
        RuntimeError: the C++ extension is not built.
        TypeError: a budget that is no number; costs that are no whole numbers.
        ValueError: a similarity that is negative or not finite; a budget that cannot be met; costs below 1.
    """
    if importlib.util.find_spec("sparseft._C") is None:
        raise RuntimeError(
            "lazy_greedy needs the C++ extension, which is not built; build it with `pip install "
            "--no-build-isolation .`, or use plain_greedy, which takes as many evaluations as candidates times budget"
        )
    prices, most = _priced(budget, costs, len(objective.similarity))
    arrays = [part.detach().cpu().contiguous().numpy() for part in (*objective.coverage(), prices)]
    extension = importlib.import_module("sparseft._C")
    indices, gains, evaluations = extension.lazy_greedy(*arrays, budget=most, stop_at_zero=stop_at_zero)
    return Greedy(torch.tensor(indices, dtype=torch.long), torch.tensor(gains, dtype=torch.float64), evaluations)


def plain_greedy(
    objective: Objective,
    budget: int | float,
    *,
    costs: Sequence[int] | Tensor | None = None,
    stop_at_zero: bool = False,
) -> Greedy:
    """Do what `lazy_greedy` does by evaluating every candidate every time, in plain PyTorch: what it must choose."""
    prices, rest = _priced(budget, costs, len(objective.similarity))
    function = objective.coverage()
    if not bool(function.similarity.isfinite().all()) or bool((function.similarity < 0).any()):
        raise ValueError("similarity must be finite and not negative; shift or clip it with sparseft.data.nonnegative")
    left = torch.ones(len(function.similarity), dtype=torch.bool)
    covered, indices, gains, evaluations = function.floor, [], [], 0
    while bool((left := left & (prices <= rest)).any()):
        every = _gains(function, covered)
        evaluations += int(left.sum())
        best = int((every / prices).masked_fill(~left, -math.inf).argmax())
        if stop_at_zero and not every[best] > 0:
            break
        left[best], rest = False, rest - int(prices[best])
        covered = torch.maximum(covered, torch.minimum(function.similarity[best], function.cap))
        indices.append(best)
        gains.append(float(every[best]))
    return Greedy(torch.tensor(indices, dtype=torch.long), torch.tensor(gains, dtype=torch.float64), evaluations)


def _priced(budget: int | float, costs: Sequence[int] | Tensor | None, candidates: int) -> tuple[Tensor, int]:
    """Return the cost of each candidate, int64 [candidates] on the CPU, and the most that those chosen may cost."""
    if costs is None:
        return torch.ones(candidates, dtype=torch.int64), _resolved(budget, 1, candidates, "candidates there are")
    prices = torch.as_tensor(costs).cpu()
    if prices.is_floating_point() or prices.is_complex() or prices.dtype == torch.bool:
        raise TypeError(f"costs must be whole numbers, got {prices.dtype}")
    if prices.shape != (candidates,) or int(prices.min()) < 1:
        raise ValueError(
            f"costs must be numbers of at least 1, one for each of {candidates} candidates, got "
            f"{f'one of {int(prices.min())}' if prices.shape == (candidates,) else list(prices.shape)}"
        )
    prices = prices.long()
    return prices, _resolved(budget, int(prices.min()), int(prices.sum()), "that all candidates cost")


def _resolved(budget: int | float, least: int, most: int, what: str) -> int:
    """Return a budget as a count, from what one candidate takes to what all of them do.

    Raises:
        TypeError: it is no number.
        ValueError: it lies outside.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise TypeError(f"budget must be a count, or a share as a float, got {type(budget).__name__}")
    if isinstance(budget, float):
        if not 0 < budget <= 1:
            raise ValueError(f"budget must lie in (0, 1] as a share, got {budget}; give a count as an int")
        # a product like 0.29 * 100 falls just below its integer in binary
        return max(least, math.floor(budget * most * (1 + 1e-12)))
    if not least <= budget <= most:
        raise ValueError(f"budget must be from {least} to the {most} {what}, got {budget}")
    return budget


def _gains(function: Coverage, covered: Tensor) -> Tensor:
    """Return what each candidate would add, fp64 [candidates], by sums whose order is that of the compiled code."""
    reached = torch.minimum(function.similarity, function.cap).double()
    more = (reached - covered.double()).clamp_min(0)
    blocks = torch.nn.functional.pad(more, (0, -more.shape[1] % _LANES)).split(_LANES, dim=1)
    lanes = torch.zeros_like(blocks[0])
    for block in blocks:
        lanes += block
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0] + function.bonus
