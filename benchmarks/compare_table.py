"""The rows of compare.py as a table: a line a method, means over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import ways

# what all runs of a comparison have in common; rates are each method's own
COMMON = ("density", "epochs", "batch_size", "max_length", "samples", "bf16")
Row = dict[str, str]


def current(rows: Sequence[Row]) -> list[Row]:
    """Return the runs at the rates of each method's newest one.

    Raises:
        ValueError: runs differ in more than their rates.
    """
    for name in COMMON:
        found = sorted({row[name] for row in rows})
        if len(found) > 1:
            raise ValueError(f"runs that are compared must have one {name}, got {', '.join(found)}; keep others apart")
    newest = {row["way"]: row for row in rows}
    return [row for row in rows if all(row[name] == newest[row["way"]][name] for name in ("lr", "head_lr"))]


def table(rows: Sequence[Row]) -> str:
    """Return a table of Markdown, methods in the order of `ways.WAYS`; empty without rows."""
    tasks = sorted({row["task"] for row in rows}, reverse=True)
    header = ["method", "what trains", "lr", "changed in the end", *tasks]
    lines = [header, ["---"] * len(header)]
    for name in ways.WAYS:
        if mine := [row for row in rows if row["way"] == name]:
            lines.append(_line(mine, tasks))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""


def _line(rows: Sequence[Row], tasks: Sequence[str]) -> list[str]:
    name = rows[0]["way"]
    weights = statistics.mean(int(row["changed_weights"]) for row in rows)
    cells = [_cell([100 * float(row["dev_accuracy"]) for row in rows if row["task"] == task]) for task in tasks]
    return [name, ways.WAYS[name].budget, f"{float(rows[-1]['lr']):g}", f"{weights:,.0f}", *cells]


def _cell(figures: Sequence[float]) -> str:
    if len(figures) < 2:
        return "".join(f"{figure:.1f}" for figure in figures)
    return f"{statistics.mean(figures):.1f} ± {statistics.stdev(figures):.1f}"
