"""The search: from a set of samples and a set of entries to smaller ones, a cell at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparseft.selection.ird.options import Options
from sparseft.selection.ird.path import Cell
from sparseft.selection.ird.ranking import best_entries, best_samples, capped, halved
from sparseft.selection.ird.store import Store

# a round of each order: steps one after the other, or (branch) alternatives
_ROUNDS = {
    "joint": ("both",),
    "samples_first": ("samples", "parameters"),
    "params_first": ("parameters", "samples"),
    "branch": ("samples", "parameters", "both"),
}


@dataclass(frozen=True)
class Point:
    """Where a search stands: samples, entries, and what was measured there.

    Attributes:
        samples: positions in the data, ascending.
        entries: sorted, int64.
        sums: of the squared gradients over the samples, fp32, one an entry.
        scores: of the samples, the sums over the entries.
        number: of its cell.
    """

    samples: tuple[int, ...]
    entries: Tensor
    sums: Tensor
    scores: Mapping[int, float]
    number: int


@dataclass
class Space:
    """What a search moves in.

    Attributes:
        store: measures any samples and entries.
        total: number of selectable entries.
        groups: a function that counts entries by the groups they are ranked in: all together, or by parameter.
        least: number of entries in each group at which halving ends.
        everywhere: the `restrict="global"` choice: samples, counts -> entries, among all.
        fixed: scores of the samples that hold for the whole search (`sample_score="all"`).
        classes: of the samples, or None.
        lengths: of the samples, or None.
        judge: entries -> figure; None without an evaluator.
    """

    store: Store
    total: int
    groups: Callable[[Tensor], list[int]]
    least: list[int]
    everywhere: Callable[[tuple[int, ...], list[int]], Tensor] | None = None
    fixed: Mapping[int, float] | None = None
    classes: Mapping[int, int] | None = None
    lengths: Mapping[int, int] | None = None
    judge: Callable[[Tensor], float] | None = None


class Search:
    """Walks from a start, and notes every cell it looks at.

    Attributes:
        cells: those looked at.
        entries: of each cell.
        capped: positions of the samples that influence_cap scaled down, ascending.
    """

    def __init__(self, space: Space, options: Options) -> None:
        self._space, self._options = space, options
        self._weights: dict[int, float] = {}
        self._mass = 0.0
        self._last = 0
        self.cells: list[Cell] = []
        self.entries: list[Tensor] = []
        self.capped: list[int] = []

    def run(self, samples: list[int], entries: Tensor) -> None:
        """Search from here; mark the chosen cell."""
        sums, scores = self._space.store.measure(samples, entries, {})
        samples = sorted(scores)
        self._weights, scores = capped(scores, self._options.influence_cap)
        self.capped = sorted(self._weights)
        if self._weights:
            sums, _ = self._space.store.measure(samples, entries, self._weights)
        self._mass = sum(scores.values())
        if not self._mass:
            raise ValueError("every gradient is zero: no entry is better than another; check the loss and the labels")
        self._start = Point(tuple(samples), entries, sums, scores, 0)
        if self._options.order == "grid":
            self._grid()
        else:
            self._note("start", None, self._start)
            self._walk()
        chosen = self._best() if self._space.judge else self._last
        self.cells[chosen] = replace(self.cells[chosen], chosen=True)

    def _walk(self) -> None:
        point, best, rounds = self._start, 0, 0
        while True:
            steps = [step for step in _ROUNDS[self._options.order] if self._possible(step, point)]
            if not steps:
                break
            if self._options.order == "branch":
                looked_at = [self._step(step, point) for step in steps]
                point = max(looked_at, key=lambda each: self._worth(each.number))
            else:
                for step in steps:
                    point = self._step(step, point)
            if self._space.judge:
                rounds = rounds + 1 if self._best() == best else 0
                best = self._best()
                if rounds == self._options.patience:
                    break
        self._last = point.number

    def _possible(self, step: str, point: Point) -> bool:
        samples = self._fewer_samples(point) < len(point.samples)
        entries = self._fewer_entries(point) != self._space.groups(point.entries)
        if step == "both":
            # where only one is left to halve, branch has a step of its own for it
            return samples and entries if self._options.order == "branch" else samples or entries
        return samples if step == "samples" else entries

    def _step(self, step: str, point: Point) -> Point:
        samples = point.samples
        if step != "parameters":
            samples = tuple(self._keep_samples(point, self._fewer_samples(point)))
        counts = self._space.groups(point.entries) if step == "samples" else self._fewer_entries(point)
        entries = self._keep_entries(samples, point, counts)
        if step == "both" and samples == point.samples:
            step = "parameters"
        elif step == "both" and counts == self._space.groups(point.entries):
            step = "samples"
        return self._measured(step, point.number, samples, entries)

    def _grid(self) -> None:
        samples, ladder = len(self._start.samples), [self._start]
        while halved(samples, self._options.min_samples) < samples:
            samples = halved(samples, self._options.min_samples)
            kept = tuple(self._keep_samples(self._start, samples))
            sums, scores = self._space.store.measure(kept, self._start.entries, self._weights)
            ladder.append(replace(self._start, samples=kept, sums=sums, scores=scores))
        for row in ladder:
            counts = self._space.groups(self._start.entries)
            while True:
                entries = self._keep_entries(row.samples, row, counts)
                self._measured("grid" if self.cells else "start", 0 if self.cells else None, row.samples, entries)
                fewer = [halved(c, least) for c, least in zip(counts, self._space.least, strict=True)]
                if fewer == counts:
                    break
                counts = fewer
        self._last = len(self.cells) - 1

    def _keep_samples(self, point: Point, count: int) -> list[int]:
        """Return which of a point's samples stay."""
        scores = point.scores
        if not self._options.rescore or torch.equal(point.entries, self._start.entries):
            # the same figures, but that those of capped samples are equal to the last bit
            scores = self._start.scores
        if self._space.fixed is not None:
            scores = {position: self._weights.get(position, 1.0) * s for position, s in self._space.fixed.items()}
        scores = {position: scores[position] for position in point.samples}
        if self._space.lengths is not None:
            scores = {position: score / self._space.lengths[position] for position, score in scores.items()}
        lowest = self._options.reverse in ("samples", "both")
        return best_samples(scores, count, lowest=lowest, classes=self._space.classes)

    def _keep_entries(self, samples: tuple[int, ...], point: Point, counts: list[int]) -> Tensor:
        """Return which entries stay, or come, for some samples of a point."""
        if self._space.everywhere is not None:
            return self._space.everywhere(samples if self._options.rescore else self._start.samples, counts)
        if counts == self._space.groups(point.entries):
            return point.entries
        if not self._options.rescore:
            sums = self._start.sums[torch.searchsorted(self._start.entries, point.entries)]
        elif samples == point.samples:
            sums = point.sums
        else:
            sums, _ = self._space.store.measure(samples, point.entries, self._weights)
        lowest = self._options.reverse in ("parameters", "both")
        return point.entries[best_entries(sums, self._space.groups(point.entries), counts, lowest=lowest)]

    def _fewer_samples(self, point: Point) -> int:
        return halved(len(point.samples), self._options.min_samples)

    def _fewer_entries(self, point: Point) -> list[int]:
        counts = self._space.groups(point.entries)
        return [halved(count, least) for count, least in zip(counts, self._space.least, strict=True)]

    def _measured(self, step: str, parent: int | None, samples: tuple[int, ...], entries: Tensor) -> Point:
        sums, scores = self._space.store.measure(samples, entries, self._weights)
        point = Point(samples, entries, sums, scores, len(self.cells))
        self._note(step, parent, point)
        return point

    def _note(self, step: str, parent: int | None, point: Point) -> None:
        figure = None
        if self._space.judge is not None:
            same = next((n for n, entries in enumerate(self.entries) if torch.equal(entries, point.entries)), None)
            figure = self._space.judge(point.entries) if same is None else self.cells[same].figure
        mass = sum(point.scores.values()) / self._mass
        density = len(point.entries) / self._space.total
        self.cells.append(Cell(step, parent, point.samples, len(point.entries), density, mass, figure))
        self.entries.append(point.entries)

    def _worth(self, number: int) -> float:
        cell = self.cells[number]
        return cell.fisher_mass if cell.figure is None else cell.figure

    def _best(self) -> int:
        """Return the number of the best cell; of equals, the first."""
        return max(range(len(self.cells)), key=self._worth)
