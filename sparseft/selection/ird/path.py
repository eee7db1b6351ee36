"""The path of a search: every cell that was looked at, as a table, as plain values for a file, as a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sparseft.mask import Mask, check_mask


@dataclass(frozen=True)
class Cell:
    """Samples and entries that a search looked at together.

    Attributes:
        step: what led there: "start", or what was halved: "samples", "parameters" or "both"; "grid" in a grid.
        parent: number of the cell it came from; None at the start.
        positions: where the samples kept stand in the data.
        parameters: number of entries kept.
        density: kept over selectable entries.
        fisher_mass: sum of the squared gradients of these samples at these entries, over that of the first cell.
        figure: the evaluator's, higher is better; None without an evaluator.
        chosen: this cell's entries are the mask.
    """

    step: str
    parent: int | None
    positions: tuple[int, ...]
    parameters: int
    density: float
    fisher_mass: float
    figure: float | None = None
    chosen: bool = False

    @property
    def samples(self) -> int:
        """Number of samples kept."""
        return len(self.positions)


@dataclass(frozen=True)
class IRDPath:
    """The path of a search.

    Attributes:
        cells: in the order they were looked at; a cell's number is its place here.
        notes: how it was made, and whatever did not go the usual way.
        masks: one a cell, if the path comes from `ird_search`; a path read from a mask has none.
    """

    cells: tuple[Cell, ...]
    notes: tuple[str, ...] = ()
    masks: tuple[Mask, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def of(cls, mask: Mask) -> IRDPath:
        """Return the path that a mask of method "ird" was found on; it is saved with the mask.

        Raises:
            TypeError: the mask is none.
            ValueError: the mask was made by another method.
        """
        check_mask(mask)
        found = mask.info.get("path")
        if not isinstance(found, Mapping):
            raise ValueError(
                f"the mask must come from method 'ird', got {mask.info.get('method', 'one without name')!r}"
            )
        cells = [Cell(**{**cell, "positions": tuple(cell["positions"])}) for cell in found["cells"]]
        return cls(tuple(cells), tuple(found["notes"]))

    @property
    def chosen(self) -> int:
        """Number of the cell whose entries are the mask."""
        return next(number for number, cell in enumerate(self.cells) if cell.chosen)

    @property
    def mask(self) -> Mask:
        """The mask of the chosen cell.

        Raises:
            ValueError: the path was read from a mask.
        """
        if not self.masks:
            raise ValueError("a path read from a mask holds no masks; the mask it was read from is the chosen one")
        return self.masks[self.chosen]

    def plain(self) -> dict[str, Any]:
        """Return cells and notes as JSON values."""
        return {
            "cells": [{**asdict(cell), "positions": list(cell.positions)} for cell in self.cells],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        heads = ("cell", "from", "step", "samples", "parameters", "density", "Fisher mass", "figure")
        rows = [
            (
                f"{'*' if cell.chosen else ''}{number}",
                "" if cell.parent is None else str(cell.parent),
                cell.step,
                f"{cell.samples:,}",
                f"{cell.parameters:,}",
                f"{cell.density:.4%}",
                f"{cell.fisher_mass:.1%}",
                "" if cell.figure is None else f"{cell.figure:.4f}",
            )
            for number, cell in enumerate(self.cells)
        ]
        return "\n".join([*_aligned([heads, *rows]), *self.notes, "* the mask"])

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the path to a file: samples against density, a dot a cell, the darker the better.

        Raises:
            FileNotFoundError: the folder of the file is not there.
            RuntimeError: matplotlib is not installed.
            ValueError: the path's ending is none of matplotlib's formats.
        """
        from sparseft.selection.ird.picture import draw

        draw(self.cells, path)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
