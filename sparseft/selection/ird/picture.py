"""The picture of a search's path."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparseft.files import check_folder
from sparseft.pictures import figure

if TYPE_CHECKING:
    from sparseft.selection.ird.path import Cell


def draw(cells: Sequence[Cell], path: str | os.PathLike[str]) -> None:
    """Draw cells to a file whose name ends in .png, .pdf or .svg.

    Raises:
        FileNotFoundError: the folder of the file is not there.
        RuntimeError: matplotlib is not installed.
    """
    check_folder(path)
    judged = all(cell.figure is not None for cell in cells)
    shades = [cell.figure if cell.figure is not None else cell.fisher_mass for cell in cells]
    canvas = figure(6.5, 4.5)
    axes = canvas.subplots()
    for cell in cells:
        if cell.parent is not None and cell.step != "grid":
            parent = cells[cell.parent]
            axes.annotate(
                "",
                (cell.samples, 100 * cell.density),
                (parent.samples, 100 * parent.density),
                arrowprops={"arrowstyle": "->", "color": "0.6", "shrinkA": 7, "shrinkB": 7},
            )
    dots = axes.scatter(
        [cell.samples for cell in cells],
        [100 * cell.density for cell in cells],
        c=shades,
        s=110,
        cmap="Blues",
        edgecolors=["crimson" if cell.chosen else "0.5" for cell in cells],
        linewidths=[2.5 if cell.chosen else 0.8 for cell in cells],
        zorder=3,
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(sorted({cell.samples for cell in cells}), labels=sorted({str(c.samples) for c in cells}, key=int))
    axes.set_yticks(densities := sorted({100 * c.density for c in cells}), labels=[f"{d:.3g} %" for d in densities])
    axes.minorticks_off()
    axes.set_xlabel("samples kept")
    axes.set_ylabel("density")
    axes.set_title("IRD: every cell, the mask ringed in red")
    canvas.colorbar(dots, label="evaluator's figure" if judged else "Fisher mass kept")
    canvas.savefig(path)
