"""How a space spends a budget on a model: every strategy's size in every group, and the weights that it trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from sparseft.design_space.costs import Cost, Costs
from sparseft.design_space.layers import Layer, find_layers
from sparseft.design_space.sizes import allocate
from sparseft.design_space.space import STRATEGIES, Space, check_space
from sparseft.selection.arguments import check_model, check_number

Remainder = Literal["error", "sparse", "leave"]

_REMAINDERS = ("error", "sparse", "leave")
_UNITS = {"A": "width", "B": "biases", "L": "rank", "P": "length", "S": "entries"}


@dataclass(frozen=True)
class Part:
    """What one strategy does in a group.

    Attributes:
        strategy: its letter.
        size: the rank of LoRA, the length of a prefix, the width of an adapter; the weights of BitFit and sparse.
        weights: how many weights it trains.
        names: the modules it is attached to; the parameters it trains or, sparse, selects from.
    """

    strategy: str
    size: int
    weights: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class GroupPlan:
    """One group: its layers, its budget, and what it is spent on; a group that does not train has no parts."""

    number: int
    layers: tuple[Layer, ...]
    budget: int
    parts: tuple[Part, ...]

    @property
    def weights(self) -> int:
        """Number of weights that train."""
        return sum(part.weights for part in self.parts)


@dataclass(frozen=True)
class Plan:
    """What a space means for one model. Printed, it is a table."""

    space: Space
    groups: tuple[GroupPlan, ...]
    budget: int
    lora_scale: float = 1.0

    @property
    def weights(self) -> int:
        """Number of weights that train: the budget, unless a remainder was left."""
        return sum(group.weights for group in self.groups)

    def parts(self, strategy: str) -> list[Part]:
        """Return what a strategy does, in every group that has it."""
        return [part for group in self.groups for part in group.parts if part.strategy == strategy]

    def __str__(self) -> str:
        rows = [("group", "layers", "budget", "strategy", "size", "weights")]
        for group in self.groups:
            head = (str(group.number), str(len(group.layers)), f"{group.budget:,}")
            for part in group.parts:
                size = f"{_UNITS[part.strategy]} {part.size:,}"
                rows.append((*head, STRATEGIES[part.strategy], size, f"{part.weights:,}"))
                head = ("", "", "")
            if not group.parts:
                rows.append((*head, "frozen", "", "0"))
        layers = sum(len(group.layers) for group in self.groups)
        rows.append(("all", str(layers), f"{self.budget:,}", "", "", f"{self.weights:,}"))
        return table(rows)


def plan(
    space: Space,
    model: nn.Module,
    budget: int,
    *,
    lora_targets: Sequence[str] = (),
    stacks: Sequence[str] | None = None,
    remainder: Remainder = "error",
    lora_scale: float = 1.0,
) -> Plan:
    """Spend a budget on a model, exactly. Nothing is changed.

    The budget is shared out over the groups by the space's allocation. Inside a group BitFit takes what its biases
    are. Then LoRA, prefix and adapter, in this order, each get the largest rank, length or width that fits into an
    equal share of what is left among those still to come, sparse included; sparse comes last and takes all that is
    left, so that the group's budget is met exactly.

    Args:
        space: the space.
        model: a model as it was pretrained; parameters without requires_grad are not counted among its biases and
            selectable entries.
        budget: number of weights to train in the layers. A head and the like are outside of it.
        lora_targets: last parts of the names of the linear layers that LoRA is attached to, as peft takes them.
        stacks: names of the lists of layers, in place of those found.
        remainder: where a group without sparse does not come out even: "error"; "sparse": selected entries fill what
            is missing; "leave": fewer weights train than the budget allows.
        lora_scale: LoRA's alpha over its rank, the same for every rank.

    Raises:
        TypeError: the space or the model is none, the budget no whole number, or lora_scale no number.
        ValueError: lora_scale is not positive; the model has no layers, or not what a strategy needs; a group's budget
            is too small for a strategy, larger than all it could train, or cannot be met exactly: the message says
            which and by how much.
    """
    check_space(space)
    check_model(model)
    if remainder not in _REMAINDERS:
        raise ValueError(f"remainder must be one of {', '.join(_REMAINDERS)}, got {remainder!r}")
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise TypeError(f"budget must be a whole number of weights, got {budget!r}")
    if budget < 1:
        raise ValueError(f"budget must be at least one weight, got {budget}")
    check_number("lora_scale", lora_scale)
    if lora_scale <= 0:
        raise ValueError(f"lora_scale must be positive, got {lora_scale}")
    groups = space.group_layers(find_layers(model, stacks))
    budgets = allocate(space.allocation, budget, [len(layers) for layers in groups], space.tunable)
    costs = Costs(model, tuple(lora_targets))
    found = []
    for number, (layers, share) in enumerate(zip(groups, budgets, strict=True), start=1):
        letters = space.strategies[number - 1] if number in space.tunable else ""
        parts = _spend(f"group {number}", layers, share, letters, costs, remainder) if letters else ()
        found.append(GroupPlan(number, tuple(layers), share, tuple(parts)))
    if remainder != "leave":
        _check_even(found)
    return Plan(space, tuple(found), budget, float(lora_scale))


def _spend(
    group: str, layers: Sequence[Layer], budget: int, letters: str, costs: Costs, remainder: Remainder
) -> list[Part]:
    """Return what a group's budget is spent on, in the order B, L, P, A, S."""
    left, parts = budget, []
    to_come = [letter for letter in "BLPAS" if letter in letters]
    for position, letter in enumerate(to_come):
        cost = costs.of(letter, layers, letters, group)
        share = left if letter in "BS" else left // (len(to_come) - position)
        part = _fitting(group, letter, cost, share)
        parts.append(part)
        left -= part.weights
    if left and remainder == "sparse" and "S" not in letters:
        parts.append(_fitting(group, "S", costs.of("S", layers, letters, group), left))
    return parts


def _fitting(group: str, letter: str, cost: Cost, share: int) -> Part:
    """Return the largest size of a strategy that its share pays for."""
    what = STRATEGIES[letter]
    least = cost.fixed + cost.unit
    if share < least:
        unit = "" if letter == "B" else f" for {_UNITS[letter]} 1"
        raise ValueError(
            f"{group}: {what} needs {least:,} weights{unit}, and its share of the group's budget is {share:,}: "
            f"{least - share:,} too few; raise the budget or give the group fewer strategies"
        )
    if letter == "B":
        return Part(letter, cost.unit, cost.unit, cost.names)
    size = (share - cost.fixed) // cost.unit
    if cost.most is not None and size > cost.most:
        if letter == "S":
            raise ValueError(
                f"{group}: {share:,} weights are to be selected from {cost.most:,}: {share - cost.most:,} too many; "
                "lower the budget"
            )
        size = cost.most
    return Part(letter, size, cost.fixed + size * cost.unit, cost.names)


def _check_even(groups: Sequence[GroupPlan]) -> None:
    short = [
        f"group {group.number} by {group.budget - group.weights:,} of its {group.budget:,}"
        for group in groups
        if group.weights != group.budget
    ]
    if short:
        raise ValueError(
            f"the budget cannot be met exactly without selected entries: weights are left over in {', '.join(short)}; "
            "add S to these groups, or choose remainder='sparse' to fill up or remainder='leave' to train fewer"
        )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as lines of aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
