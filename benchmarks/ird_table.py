"""What the rows of ird.py say: means over seeds, and in how many cells IRD is ahead."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

OPTIONS = ("ird-balanced", "ird-length", "ird-cap-2", "ird-cap-1")  # IRD with another score of samples
# (task, samples, density) -> method -> seed -> figure
Cells = dict[tuple[str, int, float], dict[str, dict[int, float]]]


def table(
    rows: Sequence[dict[str, str]], order: Sequence[str], majority: Sequence[dict[str, str]] | None = None
) -> str:
    """Return the rows as a table of means over seeds, and how often IRD is ahead of each other method.

    order: of the methods. majority: rows of --majority, for the share of the largest class, and which means are above.

    Raises:
        ValueError: the majority of a task's dev rows is not there.
    """
    rows = [row for row in rows if row["method"] in order]
    found = _by_cell(rows, "dev_accuracy")
    names = [name for name in order if any(name in methods for methods in found.values())]
    shares = {} if majority is None else _shares(rows, majority)
    header = ["task", "samples", "density", *(["largest class"] if shares else []), *names]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for (task, samples, density), methods in found.items():
        figures = [f"{100 * shares[task]:.1f}"] if shares else []
        figures += [_figure(list(methods.get(name, {}).values())) for name in names]
        lines.append(f"| {task} | {samples} | {100 * density:g} % | " + " | ".join(figures) + " |")
    if shares:
        lines += ["", "How many means are above the share of the largest class among the dev rows, which a constant"]
        lines += ["answer reaches, by more than twice their standard error:"]
        lines += [_above(task, found, share) for task, share in sorted(shares.items())]
    lines += ["", "Dev accuracy in percent: mean and standard deviation over seeds, and their number. Paired by seed,"]
    for other in names:
        if other != "ird":
            lines.append(f"- dev accuracy, {_verdict(found, other, 100, 'points')}")
            losses = _by_cell(rows, "dev_loss")
            lines.append("- dev loss, " + _verdict(losses, other, -1, "nats (positive: IRD's loss is lower)"))
    return "\n".join(lines)


def options(rows: Sequence[dict[str, str]]) -> str:
    """Return the same of IRD with other scores of samples, beside plain IRD; empty without such rows."""
    found = {(row["task"], row["samples"], row["density"]) for row in rows if row["method"] in OPTIONS}
    there = [row for row in rows if (row["task"], row["samples"], row["density"]) in found]
    return table(there, ["ird", *OPTIONS]) if found else ""


def _shares(rows: Sequence[dict[str, str]], majority: Sequence[dict[str, str]]) -> dict[str, float]:
    known = {(row["task"], row["dev_rows"]): float(row["largest_class"]) for row in majority}
    shares = {}
    for task, size in dict.fromkeys((row["task"], row["dev_rows"]) for row in rows):
        if (task, size) not in known:
            raise ValueError(f"the majority of {task} must have a row with {size} dev rows; run ird.py --majority")
        shares[task] = known[task, size]
    return shares


def _above(task: str, found: Cells, share: float) -> str:
    """Say how many means are above what a constant answer reaches, by more than noise."""
    # what looks at no samples is the same in all rows of its density
    means = {
        (name, density, 0 if name == "random" else samples): list(seeds.values())
        for (of, samples, density), methods in found.items()
        if of == task
        for name, seeds in methods.items()
    }
    clear = [
        statistics.mean(values) - share > 2 * statistics.stdev(values) / len(values) ** 0.5
        for values in means.values()
        if len(values) > 1
    ]
    if any(clear):
        return f"- {task}: {sum(clear)} of {len(means)}"
    return f"- {task}: none of {len(means)}, so that differences there rank nothing"


def _by_cell(rows: Sequence[dict[str, str]], column: str) -> Cells:
    found: Cells = {}
    for row in rows:
        key = (row["task"], int(row["samples"]), float(row["density"]))
        found.setdefault(key, {}).setdefault(row["method"], {})[int(row["seed"])] = float(row[column])
    # what looks at no samples stands in every row of its density
    for (task, samples, density), methods in found.items():
        if samples:
            methods.update(found.get((task, 0, density), {}))
    return {key: methods for key, methods in sorted(found.items()) if key[1]}


def _figure(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread} ({len(values)})"


def _verdict(found: Cells, other: str, sign: float, unit: str) -> str:
    """Say in how many cells IRD is ahead of another method, and in how many of them by more than noise."""
    means, clear, pairs = [], [], []
    for methods in found.values():
        ours, theirs = methods.get("ird", {}), methods.get(other, {})
        differences = [sign * (ours[seed] - theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
        if differences:
            pairs += differences
            means.append(statistics.mean(differences))
            error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("inf")
            clear.append(abs(means[-1]) > 2 * error)
    if not pairs:
        return f"IRD and {other}: no cell was run with both"
    ahead = sum(mean > 0 for mean in means), sum(mean > 0 and sure for mean, sure in zip(means, clear, strict=True))
    behind = sum(mean < 0 for mean in means), sum(mean < 0 and sure for mean, sure in zip(means, clear, strict=True))
    return (
        f"IRD and {other}: ahead in {ahead[0]} of {len(means)} cells and behind in {behind[0]}, by more than twice "
        f"the standard error in {ahead[1]} and {behind[1]}; {statistics.mean(pairs):+.3f} {unit} over all "
        f"{len(pairs)} pairs"
    )
