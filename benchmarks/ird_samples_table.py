"""What the rows of ird.py --choose say: which samples each score keeps, and how many wrong labels among them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

Row = dict[str, str]


def table(rows: Sequence[Row], order: Sequence[str]) -> str:
    """Return two tables of means over seeds: of what true labels lead to, and of the wrong labels kept.

    order: of the methods.
    """
    true = [row for row in rows if not float(row["flip"])]
    wrong = [row for row in rows if float(row["flip"])]
    parts = [make(part, order) for make, part in ((_true, true), (_wrong, wrong)) if part]
    return "\n\n".join(parts)


def _true(rows: Sequence[Row], order: Sequence[str]) -> str:
    names = ("length, of the pool's", "largest class", "in the pool", "overlap with ird", "capped")
    lines = [f"| task | model | samples | method | {' | '.join(names)} |", "|---" * (4 + len(names)) + "|"]
    columns = ("kept_length", "kept_largest_class", "pool_largest_class", "overlap_with_ird")
    for (task, tuned, samples, method), group in _grouped(rows, ("task", "tuned", "samples", "method"), order).items():
        figures = [*(_figure(group, column, 100) for column in columns), _figure(group, "capped")]
        lines.append(f"| {task} | {_model(rows, task, tuned)} | {samples} | {method} | {' | '.join(figures)} |")
    return "\n".join(
        [
            *lines,
            "",
            "True labels. In percent: the mean length of the samples kept, the share of their largest class and that",
            "in the pool, and the mask's overlap with plain IRD's; then the number of samples that the cap bound.",
            f"Mean and standard deviation over {_seeds(rows)} seeds.",
        ]
    )


def _wrong(rows: Sequence[Row], order: Sequence[str]) -> str:
    counts = sorted({int(row["samples"]) for row in rows}, reverse=True)
    names = [*(f"wrong at {count} kept" for count in counts), "capped"]
    lines = [f"| task | model | made wrong | method | {' | '.join(names)} |", "|---" * (4 + len(names)) + "|"]
    for (task, tuned, flip, method), group in _grouped(rows, ("task", "tuned", "flip", "method"), order).items():
        figures = [_kept([row for row in group if int(row["samples"]) == count]) for count in counts]
        figures.append(_figure(group, "capped"))
        model = _model(rows, task, tuned)
        lines.append(f"| {task} | {model} | {100 * float(flip):g} % | {method} | {' | '.join(figures)} |")
    return "\n".join(
        [
            *lines,
            "",
            "Wrong labels among the samples kept, of those in the pool, and how many a draw would keep. A tuned model",
            "was fine-tuned whole on rows outside the pool, with true labels; its dev accuracy stands beside it.",
            f"Mean and standard deviation over {_seeds(rows)} seeds.",
        ]
    )


def _grouped(rows: Sequence[Row], columns: tuple[str, ...], order: Sequence[str]) -> dict[tuple[str, ...], list[Row]]:
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[column] for column in columns), []).append(row)

    def place(key: tuple[str, ...]) -> tuple[str | float, ...]:
        return *(-float(value) if value[0].isdigit() else value for value in key[:-1]), order.index(key[-1])

    return {key: found[key] for key in sorted(found, key=place)}


def _model(rows: Sequence[Row], task: str, tuned: str) -> str:
    if tuned == "False":
        return "new head"
    these = [row for row in rows if (row["task"], row["tuned"]) == (task, tuned)]
    seeds = {row["seed"]: float(row["start_dev_accuracy"]) for row in these}
    return f"tuned, {100 * statistics.mean(seeds.values()):.1f} %"


def _seeds(rows: Sequence[Row]) -> int:
    return len({row["seed"] for row in rows})


def _kept(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    wrong = statistics.mean(int(row["wrong_in_pool"]) for row in rows)
    chance = wrong * int(rows[0]["samples"]) / int(rows[0]["pool"])
    return f"{_figure(rows, 'wrong_kept')} of {wrong:g} (chance {chance:.1f})"


def _figure(rows: Sequence[Row], column: str, scale: float = 1) -> str:
    values = [scale * float(row[column]) for row in rows]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"
