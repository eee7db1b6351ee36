"""What the rows of ird.py say: means over seeds, and in how many cells IRD is ahead."""

from __future__ import annotations

import statistics

# (task, samples, density) -> method -> seed -> figure
Cells = dict[tuple[str, int, float], dict[str, dict[int, float]]]


def table(rows: list[dict[str, str]], order: list[str]) -> str:
    """Return the rows as a table of means over seeds, and how often IRD is ahead of each other method.

    order: of the methods.
    """
    found = _by_cell(rows, "dev_accuracy")
    names = [name for name in order if any(name in methods for methods in found.values())]
    lines = ["| task | samples | density | " + " | ".join(names) + " |", "|---" * (3 + len(names)) + "|"]
    for (task, samples, density), methods in found.items():
        figures = [_figure(list(methods.get(name, {}).values())) for name in names]
        lines.append(f"| {task} | {samples} | {100 * density:g} % | " + " | ".join(figures) + " |")
    lines += ["", "Dev accuracy in percent: mean and standard deviation over seeds, and their number. Paired by seed,"]
    for other in names:
        if other != "ird":
            lines.append(f"- dev accuracy, {_verdict(found, other, 100, 'points')}")
            losses = _by_cell(rows, "dev_loss")
            lines.append("- dev loss, " + _verdict(losses, other, -1, "nats (positive: IRD's loss is lower)"))
    return "\n".join(lines)


def _by_cell(rows: list[dict[str, str]], column: str) -> Cells:
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
