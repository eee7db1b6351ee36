"""The path of a search: every choice and what it was judged by, as a table and as a picture."""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass
from typing import Any

from sparseft.design_space.plan import table
from sparseft.design_space.space import Space


@dataclass(frozen=True)
class Choice:
    """One choice of one stage.

    Attributes:
        stage: "grouping", "allocation", "tunable" or "strategies of group 1" and so on.
        value: a pattern, numbers of groups, or letters of strategies.
        figures: of the spaces drawn under it; none if none was possible, or it is the same as another.
        chosen: whether it was kept.
        same_as: the earlier choice that this one is by another name, if it is.
    """

    stage: str
    value: Any
    figures: tuple[float, ...]
    chosen: bool = False
    same_as: str | None = None

    @property
    def mean(self) -> float:
        """Mean of the figures."""
        return statistics.fmean(self.figures)

    @property
    def result(self) -> str:
        """The mean, or why there is none, for readers."""
        if self.same_as is not None:
            return f"as {self.same_as}"
        return f"{self.mean:.4f}" if self.figures else "impossible"

    @property
    def label(self) -> str:
        """The value, for readers."""
        return self.value if isinstance(self.value, str) else ", ".join(map(str, self.value))


@dataclass(frozen=True)
class SearchPath:
    """The path of a search. Printed, it is a table.

    Attributes:
        choices: of every stage, in order.
        space: what was found.
    """

    choices: tuple[Choice, ...]
    space: Space

    def __str__(self) -> str:
        rows = [("stage", "choice", "spaces", "mean", "standard error", "")]
        last = ""
        for choice in self.choices:
            several = len(choice.figures) > 1
            error = statistics.stdev(choice.figures) / len(choice.figures) ** 0.5 if several else None
            rows.append(
                (
                    choice.stage if choice.stage != last else "",
                    choice.label,
                    str(len(choice.figures)),
                    choice.result,
                    f"{error:.4f}" if error is not None else "",
                    "kept" if choice.chosen else "",
                )
            )
            last = choice.stage
        return table(rows)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the path to a file: a panel a stage, a dot a space, a bar at the mean of each choice.

        A choice that is another one by another name is left out.

        Raises:
            FileNotFoundError: the folder of the file is not there.
            RuntimeError: matplotlib is not installed.
            ValueError: the path's ending is none of matplotlib's formats.
        """
        from sparseft.design_space.picture import draw

        draw(self.choices, path)
