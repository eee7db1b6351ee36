"""The progressive search: grouping, then allocation, then tunable groups, then each group's strategies.

Source: arXiv 2301.01821. At each stage every choice is judged by the mean of spaces drawn at random under it, with
what earlier stages chose held fixed; the best choice is kept. There is no published code of it. Where the paper's
first stage draws a strategy for every layer, groups and their strategies are drawn here. A pattern that is an earlier
one by another name, as happens in shallow models, is not judged again.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparseft.design_space.log import Log
from sparseft.design_space.path import Choice, SearchPath
from sparseft.design_space.sizes import ALLOCATIONS, GROUPINGS, group_sizes, proportions
from sparseft.design_space.space import STRATEGIES, Space
from sparseft.selection.arguments import checked_figure

# draws for each space wanted before a choice is taken to have no more of them
_DRAWS = 100


@dataclass(frozen=True)
class Options:
    """What is searched, and how long.

    Attributes:
        groups: number of groups.
        strategies: letters of the strategies to choose among, see `Space`.
        groupings, allocations: patterns to choose among.
        samples: spaces drawn for each choice; all of them where there are fewer. The paper has 100.
        seed: of the draws.
        layers: how many each stack of the model has: (12,), or (12, 12) with an encoder and a decoder. Groupings whose
            sizes are the same there are judged once; without it, only those that are the same in any model.
    """

    groups: int = 4
    strategies: str = "ABLPS"
    groupings: tuple[str, ...] = tuple(GROUPINGS)
    allocations: tuple[str, ...] = tuple(ALLOCATIONS)
    samples: int = 100
    seed: int = 0
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("groups", "samples"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not isinstance(self.layers, tuple) or not all(
            isinstance(depth, int) and not isinstance(depth, bool) and depth >= self.groups for depth in self.layers
        ):
            raise ValueError(
                f"layers must be a tuple of numbers of layers, one a stack, each at least groups={self.groups}, got "
                f"{self.layers!r}"
            )
        known: dict[str, Iterable[str]] = {
            "strategies": STRATEGIES,
            "groupings": GROUPINGS,
            "allocations": ALLOCATIONS,
        }
        for name, allowed in known.items():
            values = list(getattr(self, name))
            if not values or len(set(values)) != len(values) or not set(values) <= set(allowed):
                raise ValueError(f"{name} must be among {', '.join(allowed)}, each once, got {values}")

    def plain(self) -> dict[str, Any]:
        """Return the options as plain JSON values."""
        return {
            "groups": self.groups,
            "strategies": "".join(sorted(self.strategies)),
            "groupings": list(self.groupings),
            "allocations": list(self.allocations),
            "samples": self.samples,
            "seed": self.seed,
            "layers": list(self.layers) or None,
        }


def search(
    evaluate: Callable[[Space], float],
    options: Options | None = None,
    *,
    log: str | os.PathLike[str] | None = None,
    possible: Callable[[Space], bool] | None = None,
) -> SearchPath:
    """Search a design space stage by stage.

    What is drawn depends on the options and on what was chosen before, not on when a search was interrupted: with the
    same log it goes on where it was, and evaluates nothing twice that is there.

    Args:
        evaluate: trains a model by a space under the budget and returns its figure, finite, higher is better. A run
            that diverges should return the worst figure there is.
        options: what to search.
        log: a file of JSON lines, one for each evaluation; written as the search goes on, read when it begins.
        possible: whether a space can be applied at all, for instance whether `plan` accepts the budget. Others are
            not drawn, and a choice under which there is none is left out.

    Returns:
        The path: every choice with its mean, and the space that was found.

    Raises:
        FileNotFoundError: the folder of the log is not there.
        TypeError: evaluate is no function, or what it returns no number.
        ValueError: a figure is not finite; the log is of another search; or no choice of a stage is possible.
    """
    options = options or Options()
    if not callable(evaluate) or not isinstance(options, Options):
        raise TypeError(
            f"search takes a function that judges a Space, then Options, got {type(evaluate).__name__} and "
            f"{type(options).__name__}"
        )
    record = Log(log, options.plain())
    same = _same(options)
    distinct = tuple(value for value in options.allocations if ("allocation", value) not in same)
    drawn = replace(options, allocations=distinct)
    fixed: dict[str, Any] = {}
    choices: list[Choice] = []
    for stage in _stages(options):
        if stage.startswith("strategies") and _group(stage) not in fixed["tunable"]:
            continue
        judged = [
            Choice(stage, value, (), same_as=same[stage, value])
            if (stage, value) in same
            else _judge(stage, value, fixed, drawn, evaluate, record, possible)
            for value in _values(stage, options)
        ]
        known = [choice for choice in judged if choice.figures]
        if not known:
            raise ValueError(f"{stage}: no choice is possible; every space drawn was refused by `possible`")
        best = max(known, key=lambda choice: choice.mean)
        fixed[stage] = best.value
        choices += [replace(choice, chosen=choice is best) for choice in judged]
    return SearchPath(tuple(choices), _space(fixed, drawn, random.Random(options.seed)))


def _same(options: Options) -> dict[tuple[str, Any], str]:
    """Return the choices that are an earlier one by another name: (stage, pattern) -> that one."""
    groups, found = options.groups, {}
    meanings: dict[str, dict[str, Any]] = {
        "grouping": {
            pattern: [group_sizes(pattern, depth, groups) for depth in options.layers]
            or proportions(GROUPINGS[pattern](groups))
            for pattern in options.groupings
        },
        "allocation": {pattern: proportions(ALLOCATIONS[pattern](groups)) for pattern in options.allocations},
    }
    for stage, meaning in meanings.items():
        for pattern in meaning:
            first = next(other for other in meaning if meaning[other] == meaning[pattern])
            if first != pattern:
                found[stage, pattern] = first
    return found


def _judge(
    stage: str,
    value: Any,
    fixed: Mapping[str, Any],
    options: Options,
    evaluate: Callable[[Space], float],
    record: Log,
    possible: Callable[[Space], bool] | None,
) -> Choice:
    """Return a choice with the figures of spaces drawn under it."""
    figures = []
    for space in _drawn({**fixed, stage: value}, f"{options.seed} {stage} {value}", options, possible):
        what = {"stage": stage, "choice": value if isinstance(value, str) else list(value), "space": space.plain()}
        figure = record.get(what)
        if figure is None:
            figure = checked_figure("evaluate", evaluate(space), space)
            record.add(what, figure)
        figures.append(figure)
    return Choice(stage, value, tuple(figures))


def _drawn(
    fixed: Mapping[str, Any], seed: str, options: Options, possible: Callable[[Space], bool] | None
) -> Iterator[Space]:
    """Return different spaces, as many as asked for and found."""
    source, seen, given = random.Random(seed), set(), 0
    for _ in range(_DRAWS * options.samples):
        space = _space(fixed, options, source)
        if space not in seen:
            seen.add(space)
            if possible is None or possible(space):
                yield space
                given += 1
                if given == options.samples:
                    return


def _space(fixed: Mapping[str, Any], options: Options, source: random.Random) -> Space:
    """Return a space with what is fixed, and everything else drawn. Groups that do not train have all strategies."""
    grouping = fixed.get("grouping") or source.choice(options.groupings)
    allocation = fixed.get("allocation") or source.choice(options.allocations)
    tunable = fixed.get("tunable") or source.choice(_subsets(range(1, options.groups + 1)))
    sets = _subsets(sorted(options.strategies))
    drawn = [source.choice(sets) for _ in range(options.groups)]
    strategies = tuple(
        fixed.get(f"strategies of group {number}", "".join(letters)) if number in tunable else "".join(sets[-1])
        for number, letters in enumerate(drawn, start=1)
    )
    return Space(strategies, grouping, allocation, tunable)


def _stages(options: Options) -> list[str]:
    groups = range(1, options.groups + 1)
    return ["grouping", "allocation", "tunable", *(f"strategies of group {number}" for number in groups)]


def _values(stage: str, options: Options) -> Sequence[Any]:
    if stage == "grouping":
        return options.groupings
    if stage == "allocation":
        return options.allocations
    if stage == "tunable":
        return _subsets(range(1, options.groups + 1))
    return ["".join(letters) for letters in _subsets(sorted(options.strategies))]


def _group(stage: str) -> int:
    return int(stage.rpartition(" ")[2])


def _subsets(values: Sequence[Any] | range) -> list[tuple[Any, ...]]:
    """Return every subset but the empty one, small ones first."""
    sizes = range(1, len(values) + 1)
    return [subset for size in sizes for subset in itertools.combinations(values, size)]
