"""How many layers a group has and how many weights it may train: whole numbers with an exact sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

# weights of G groups; the sizes of groups are in these proportions
GROUPINGS: dict[str, Callable[[int], list[int]]] = {
    "increasing": lambda groups: [i + 1 for i in range(groups)],
    "uniform": lambda groups: [1] * groups,
    "decreasing": lambda groups: [groups - i for i in range(groups)],
    "spindle": lambda groups: [min(i + 1, groups - i) for i in range(groups)],
    "bottleneck": lambda groups: [(groups + 1) // 2 + 1 - min(i + 1, groups - i) for i in range(groups)],
}
# weights of one layer of each group
ALLOCATIONS = {name: GROUPINGS[name] for name in ("increasing", "uniform", "decreasing")}


def group_sizes(pattern: str | Sequence[int], layers: int, groups: int) -> list[int]:
    """Return how many consecutive layers each group has, first group first.

    Groups are in the proportions 1:2:3:4 (increasing), 1:1:1:1 (uniform), 4:3:2:1 (decreasing), 1:2:2:1 (spindle) and
    2:1:1:2 (bottleneck), written here for four groups. Where layers do not divide, each group has its share rounded
    down, and the layers left over go to the largest remainders, ties to the earlier group: a spindle of 12 layers is
    2, 4, 4, 2; of 24 it is 4, 8, 8, 4; of 32 it is 5, 11, 11, 5. No group is empty: in a shallow model an empty group
    takes a layer from the largest one (the last of those), so patterns may coincide there.

    Args:
        pattern: one of GROUPINGS, or the sizes themselves.
        layers: number of layers of the stack.
        groups: number of groups.

    Raises:
        ValueError: the pattern is unknown or does not fit the number of layers.
    """
    if not isinstance(pattern, str):
        if len(pattern) != groups or sum(pattern) != layers or min(pattern) < 1:
            raise ValueError(
                f"sizes must be {groups} positive numbers with the sum {layers}, the layers of the stack, got "
                f"{list(pattern)}"
            )
        return list(pattern)
    check_pattern("grouping", pattern, GROUPINGS)
    if groups > layers:
        raise ValueError(f"{layers} layers cannot be {groups} groups; use at most {layers} groups")
    sizes = largest_remainders(layers, GROUPINGS[pattern](groups))
    while 0 in sizes:
        largest = max(range(groups), key=lambda i: (sizes[i], i))
        sizes[largest] -= 1
        sizes[sizes.index(0)] = 1
    return sizes


def allocate(pattern: str | Sequence[float], budget: int, layers: Sequence[int], tunable: Sequence[int]) -> list[int]:
    """Return how many weights each group may train; the sum is the budget.

    A layer of group i has a share of 1 (uniform), i (increasing) or G + 1 - i (decreasing), or what is given, so a
    group's share is that times its layers. Shares are rounded as in `group_sizes`.

    Args:
        pattern: one of ALLOCATIONS, or a positive share of one layer for each group.
        budget: number of weights to train in all groups together.
        layers: number of layers of each group, of all stacks together.
        tunable: numbers of the groups that train, from 1 on; the others have 0.

    Raises:
        ValueError: the pattern is unknown or has another number of groups.
    """
    if isinstance(pattern, str):
        check_pattern("allocation", pattern, ALLOCATIONS)
        shares: Sequence[float] = ALLOCATIONS[pattern](len(layers))
    else:
        shares = pattern
    if len(shares) != len(layers):
        raise ValueError(f"an allocation must have one share for each of {len(layers)} groups, got {list(shares)}")
    weights = [
        Fraction(share) * size if i + 1 in tunable else Fraction(0)
        for i, (share, size) in enumerate(zip(shares, layers, strict=True))
    ]
    return largest_remainders(budget, weights)


def largest_remainders(total: int, weights: Sequence[int | Fraction]) -> list[int]:
    """Return whole numbers in the proportions of the weights, with the sum total. Ties go to the first."""
    whole = sum(weights)
    exact = [Fraction(total) * weight / whole for weight in weights]
    floors = [math.floor(share) for share in exact]
    order = sorted(range(len(weights)), key=lambda i: (floors[i] - exact[i], i))
    for i in order[: total - sum(floors)]:
        floors[i] += 1
    return floors


def proportions(weights: Sequence[int]) -> list[int]:
    """Return whole numbers in their lowest terms: 1:2 for 2:4."""
    return [weight // math.gcd(*weights) for weight in weights]


def check_pattern(what: str, pattern: str, known: dict[str, Callable[[int], list[int]]]) -> None:
    """Raise if a pattern is not known by name.

    Raises:
        ValueError: it is not.
    """
    if pattern not in known:
        raise ValueError(f"{what} must be one of {', '.join(known)}, or numbers, got {pattern!r}")
