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

# samples, entries -> the entries' sums over the samples, fp32 [k], and the samples' sums over the entries
Measure = Callable[[tuple[int, ...], Tensor], tuple[Tensor, dict[int, float]]]

# a round of each order: steps one after the other, or (branch) alternatives
_ROUNDS = {
    "joint": ("both",),
    "samples_first": ("samples", "parameters"),
    "params_first": ("parameters", "samples"),
    "branch": ("samples", "parameters", "both"),
}


class Point:
    """Samples and entries that a search looks at. They are measured when first asked about: that may take a pass.

    Attributes:
        samples: positions in the data, ascending.
        entries: sorted, int64.
        number: of its cell, once it has one.
    """

    def __init__(
        self, samples: tuple[int, ...], entries: Tensor, measure: Measure, scores: dict[int, float] | None = None
    ) -> None:
        self.samples, self.entries, self.number = samples, entries, -1
        self._measure = measure
        self._sums: Tensor | None = None
        self._scores = scores
        self._fewer: Point | None = None

    @property
    def sums(self) -> Tensor:
        """The entries' sums of squared gradients over the samples, fp32."""
        if self._sums is None:
            self._sums, scores = self._measure(self.samples, self.entries)
            self._scores = scores if self._scores is None else self._scores
        return self._sums

    @property
    def scores(self) -> dict[int, float]:
        """The samples' sums over the entries."""
        if self._scores is None:
            sums, self._scores = self._measure(self.samples, self.entries)
            self._sums = sums if self._sums is None else self._sums
        return self._scores

    @property
    def mass(self) -> float:
        """Sum of the squared gradients, out of the entries' sums: those need no pass after entries were halved."""
        return float(self.sums.sum(dtype=torch.float64))

    def kept(self, samples: tuple[int, ...]) -> Point:
        """Return the point of some of the samples: the same one, for branches, if they are asked for again."""
        if samples == self.samples:
            return self
        if self._fewer is None or self._fewer.samples != samples:
            self._fewer = Point(samples, self.entries, self._measure)
        return self._fewer

    def at(self, entries: Tensor) -> Point:
        """Return the point of the same samples at other entries; its sums need no pass if they are among these."""
        if entries is self.entries:
            return self
        point = Point(self.samples, entries, self._measure)
        if self._sums is not None:
            where = torch.searchsorted(self.entries, entries).clamp_(max=len(self.entries) - 1)
            if torch.equal(self.entries[where], entries):
                point._sums = self._sums[where]
        return point


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
        start = Point(tuple(samples), entries, self._measure)
        self._weights, scores = capped(start.scores, self._options.influence_cap)
        self.capped = sorted(self._weights)
        if self._weights:
            start = Point(tuple(samples), entries, self._measure, scores)
        start.samples = tuple(sorted(scores))
        self._start, self._mass = start, start.mass
        if not self._mass:
            raise ValueError("every gradient is zero: no entry is better than another; check the loss and the labels")
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
        kept = point
        if step != "parameters":
            kept = point.kept(tuple(self._keep_samples(point, self._fewer_samples(point))))
        counts = self._space.groups(point.entries) if step == "samples" else self._fewer_entries(point)
        found = self._keep_entries(kept, counts)
        if step == "both" and kept is point:
            step = "parameters"
        elif step == "both" and counts == self._space.groups(point.entries):
            step = "samples"
        self._note(step, point.number, found)
        return found

    def _grid(self) -> None:
        samples = len(self._start.samples)
        rows = [self._start]
        while halved(samples, self._options.min_samples) < samples:
            samples = halved(samples, self._options.min_samples)
            rows.append(self._start.kept(tuple(self._keep_samples(self._start, samples))))
        for point in rows:
            counts = self._space.groups(self._start.entries)
            while True:
                point = self._keep_entries(point, counts)
                self._note("grid" if self.cells else "start", 0 if self.cells else None, point)
                fewer = [halved(c, least) for c, least in zip(counts, self._space.least, strict=True)]
                if fewer == counts:
                    break
                counts = fewer
        self._last = len(self.cells) - 1

    def _keep_samples(self, point: Point, count: int) -> list[int]:
        """Return which of a point's samples stay."""
        if self._space.fixed is not None:
            scores = {position: self._weights.get(position, 1.0) * s for position, s in self._space.fixed.items()}
        else:
            # at the entries of the start the figures are the same, but that there those of capped samples are equal
            known = not self._options.rescore or torch.equal(point.entries, self._start.entries)
            scores = (self._start if known else point).scores
        scores = {position: scores[position] for position in point.samples}
        if self._space.lengths is not None:
            scores = {position: score / self._space.lengths[position] for position, score in scores.items()}
        lowest = self._options.reverse in ("samples", "both")
        return best_samples(scores, count, lowest=lowest, classes=self._space.classes)

    def _keep_entries(self, point: Point, counts: list[int]) -> Point:
        """Return the point of the same samples at the entries that stay, or come."""
        if self._space.everywhere is not None:
            return point.at(
                self._space.everywhere(point.samples if self._options.rescore else self._start.samples, counts)
            )
        if counts == self._space.groups(point.entries):
            return point
        if self._options.rescore:
            sums = point.sums
        else:
            sums = self._start.sums[torch.searchsorted(self._start.entries, point.entries)]
        lowest = self._options.reverse in ("parameters", "both")
        return point.at(point.entries[best_entries(sums, self._space.groups(point.entries), counts, lowest=lowest)])

    def _fewer_samples(self, point: Point) -> int:
        return halved(len(point.samples), self._options.min_samples)

    def _fewer_entries(self, point: Point) -> list[int]:
        counts = self._space.groups(point.entries)
        return [halved(count, least) for count, least in zip(counts, self._space.least, strict=True)]

    def _measure(self, samples: tuple[int, ...], entries: Tensor) -> tuple[Tensor, dict[int, float]]:
        return self._space.store.measure(samples, entries, self._weights)

    def _note(self, step: str, parent: int | None, point: Point) -> None:
        figure = None
        if self._space.judge is not None:
            same = next((n for n, entries in enumerate(self.entries) if torch.equal(entries, point.entries)), None)
            figure = self._space.judge(point.entries) if same is None else self.cells[same].figure
        point.number = len(self.cells)
        density = len(point.entries) / self._space.total
        mass = point.mass / self._mass
        self.cells.append(Cell(step, parent, point.samples, len(point.entries), density, mass, figure))
        self.entries.append(point.entries)

    def _worth(self, number: int) -> float:
        cell = self.cells[number]
        return cell.fisher_mass if cell.figure is None else cell.figure

    def _best(self) -> int:
        """Return the number of the best cell; of equals, the first."""
        return max(range(len(self.cells)), key=self._worth)
