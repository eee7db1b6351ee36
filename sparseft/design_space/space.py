"""One point of the design space, as data: written by hand, read, saved and loaded."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sparseft import files
from sparseft.design_space.layers import Layer
from sparseft.design_space.sizes import ALLOCATIONS, GROUPINGS, check_pattern, group_sizes

STRATEGIES = {"A": "adapter", "B": "BitFit", "L": "LoRA", "P": "prefix", "S": "sparse"}

_FORMAT = "sparseft design space 1"


@dataclass(frozen=True)
class Space:
    """Which layers form a group, how many weights each group trains, and how.

    Attributes:
        strategies: one set of letters for each group, first layers first: "S" selected entries, "B" biases (BitFit),
            "L" LoRA, "P" prefix, "A" bottleneck adapter; "AL" is an adapter and LoRA. Their number is that of groups.
        grouping: "increasing", "uniform", "decreasing", "spindle" or "bottleneck", or layers of each group.
        allocation: "increasing", "uniform" or "decreasing" weights a layer from group to group, or such shares.
        tunable: numbers of the groups that train, from 1 on; by default all. The others' strategies are not used.

    Raises:
        ValueError: a letter, pattern or number is unknown, repeated or missing.
        TypeError: a field is of another type.
    """

    strategies: tuple[str, ...]
    grouping: str | tuple[int, ...] = "spindle"
    allocation: str | tuple[float, ...] = "uniform"
    tunable: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        groups = len(_sequence("strategies", self.strategies, str))
        if not groups:
            raise ValueError("strategies must have a set of letters for each group, got none")
        sets = tuple("".join(sorted(letters)) for letters in self.strategies)
        for letters in sets:
            if not letters or len(set(letters)) != len(letters) or set(letters) - set(STRATEGIES):
                raise ValueError(
                    f"a group's strategies must be of {', '.join(STRATEGIES)}, each once, got {letters!r}"
                )
        tunable = _sequence("tunable", self.tunable, int) or tuple(range(1, groups + 1))
        if list(tunable) != sorted(set(tunable)) or not 1 <= tunable[0] <= tunable[-1] <= groups:
            raise ValueError(f"tunable must be increasing numbers of groups from 1 to {groups}, got {list(tunable)}")
        object.__setattr__(self, "strategies", sets)
        object.__setattr__(self, "tunable", tunable)
        object.__setattr__(self, "grouping", self._checked_grouping(groups))
        object.__setattr__(self, "allocation", self._checked_allocation(groups))

    @property
    def groups(self) -> int:
        """Number of groups."""
        return len(self.strategies)

    @classmethod
    def preset(cls, name: str) -> Space:
        """Return a published pattern, one of PRESETS.

        Raises:
            ValueError: there is none of this name.
        """
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        return PRESETS[name]

    def group_layers(self, stacks: Sequence[Sequence[Layer]]) -> list[list[Layer]]:
        """Return the layers of each group: the pattern is laid over every stack, encoder and decoder alike.

        Raises:
            ValueError: the grouping does not fit the number of layers.
        """
        grouped: list[list[Layer]] = [[] for _ in range(self.groups)]
        for stack in stacks:
            rest = list(stack)
            for group, size in zip(grouped, group_sizes(self.grouping, len(rest), self.groups), strict=True):
                group.extend(rest[:size])
                del rest[:size]
        return grouped

    def plain(self) -> dict[str, Any]:
        """Return the space as plain JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_plain(cls, values: Any) -> Space:
        """Return the space of `plain`'s values; every field must be there, and nothing else.

        Raises:
            ValueError: a field is missing, unknown or out of range.
            TypeError: a field is of another type.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or set(values) != names:
            found = sorted(values) if isinstance(values, Mapping) else type(values).__name__
            raise ValueError(f"a space must have the fields {sorted(names)} and no others, got {found}")
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the space as JSON. Atomic: an older file survives a failure."""
        files.save_text(path, json.dumps({"format": _FORMAT, **self.plain()}, indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Space:
        """Read a space.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no space, or a field of it is wrong.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_unique)
            if not isinstance(values, dict) or values.pop("format", None) != _FORMAT:
                raise ValueError(f'it must be an object with "format": "{_FORMAT}"')
            return cls.from_plain(values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not a readable design space: {error}") from error

    def _checked_grouping(self, groups: int) -> str | tuple[int, ...]:
        if isinstance(self.grouping, str):
            check_pattern("grouping", self.grouping, GROUPINGS)
            return self.grouping
        sizes = _sequence("grouping", self.grouping, int)
        if len(sizes) != groups or min(sizes) < 1:
            raise ValueError(f"grouping must be {groups} positive numbers of layers, got {list(sizes)}")
        return sizes

    def _checked_allocation(self, groups: int) -> str | tuple[float, ...]:
        if isinstance(self.allocation, str):
            check_pattern("allocation", self.allocation, ALLOCATIONS)
            return self.allocation
        shares = _sequence("allocation", self.allocation, (int, float))
        if len(shares) != groups or not all(math.isfinite(share) and share > 0 for share in shares):
            raise ValueError(f"allocation must be {groups} positive shares, got {list(shares)}")
        return shares


def _sequence(name: str, values: Any, kind: type | tuple[type, ...]) -> tuple[Any, ...]:
    if not isinstance(values, tuple | list) or not all(
        isinstance(value, kind) and not isinstance(value, bool) for value in values
    ):
        raise TypeError(f"{name} must be a tuple, one value for each group, got {values!r}")
    return tuple(values)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError(f"a field is there twice, got {[name for name, _ in pairs]}")
    return values


# What the progressive search of the paper ended with, for T5-base and for T5-3B: its S4 spaces, reconstructed from
# descriptions; there is no published code to compare them with.
PRESETS = {
    "s4": Space(("AL", "AP", "ABP", "BLP")),
    "s4-3b": Space(("LP", "AL", "BLP", "ABP")),
}


def check_space(space: object) -> None:
    """Raise unless an argument is a space."""
    if not isinstance(space, Space):
        raise TypeError(
            f"space must be a Space, got {type(space).__name__}; Space.load reads one from a file, Space.preset has "
            "the paper's"
        )
