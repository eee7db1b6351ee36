"""Write the tables of README.md from the rows in results/, between their markers; --check only compares.

A figure without a row cannot get into the README, and a row that changed cannot be left out of it.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import record

ROOT = Path(__file__).resolve().parent.parent
OTHERS = ("demo-", "glue-", "sweep-")
METHODS = {"head": "head only", "random": "random", "magnitude": "magnitude", "sift": "SIFT", "fish": "FISH"}
Row = record.Row


def benchmarks(folder: Path) -> str:
    """Return a table a machine: each implementation beside each of its baselines, newest measurement of each case."""
    files = sorted(file for file in folder.glob("*.csv") if not file.name.startswith(OTHERS))
    return "\n\n".join(_machine(record.read(file)) for file in files)


def _machine(rows: list[Row]) -> str:
    newest: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = tuple(row[column] for column in record.CASE if column != "commit")
        # rows of one measurement lie together, the newest last
        same = newest.setdefault(key, [])
        if same and same[0]["commit"] != row["commit"]:
            same.clear()
        same.append(row)
    header = ["what", "case", "density", "baseline", "it takes", "sparseft", "ratio", "of the floor", "peak memory"]
    lines = [line for group in newest.values() for line in _lines(group)]
    return f"{_heading([group[0] for group in newest.values()])}\n\n{_markdown(header, lines)}"


def _heading(rows: list[Row]) -> str:
    def every(column: str) -> str:
        return " and ".join(dict.fromkeys(row[column] for row in rows if row[column]))

    versions = ", ".join(f"{name} {every(name)}" for name in ("python", "torch", "triton", "transformers"))
    return f"Measured on {every('device')}; {versions}; commit {every('commit')}, {every('date')}:"


def _lines(group: list[Row]) -> list[list[str]]:
    """Return one line a baseline. The reference stays in the rows: it is no peer."""
    ours = next(row for row in group if row["role"] == "ours")
    size = ours["unit"] == "bytes"
    lines = []
    for row in group:
        if row is ours or row["backend"] == "reference":
            continue
        peaks = [_bytes(each["peak_bytes"]) for each in (ours, row) if each["peak_bytes"]]
        lines.append(
            [
                f"`{ours['op']}`" + (", bytes" if size else ""),
                ours["shape"] + ("" if ours["dtype"] == "fp32" else f", {ours['dtype']}"),
                f"{100 * float(ours['density']):g} %" if ours["density"] else "",
                row["backend"],
                _bytes(row["median"]) if size else _seconds(row["median"]),
                _bytes(ours["median"]) if size else _seconds(ours["median"]),
                _ratio(float(ours["median"]) / float(row["median"]), "smaller" if size else "faster"),
                f"{float(ours['fraction_of_floor']):.2f}" if ours["fraction_of_floor"] else "",
                " against ".join(peaks),
            ]
        )
    return lines


def demo(folder: Path) -> str:
    """Return the newest run of the demo, a line a method."""
    blocks = []
    for file in sorted(folder.glob("demo-*.csv")):
        with file.open(newline="", encoding="utf-8") as opened:
            rows = list(csv.DictReader(opened))
        run = [row for row in rows if (row["commit"], row["date"]) == (rows[-1]["commit"], rows[-1]["date"])]
        newest = {row["method"]: row for row in run}
        blocks.append(_demo_table(list(newest.values())))
    return "\n\n".join(blocks)


def _demo_table(rows: list[Row]) -> str:
    first = rows[0]
    heading = (
        f"Measured on {first['device']}; torch {first['torch']}, transformers {first['transformers']}; "
        f"commit {first['commit']}, {first['date']}:"
    )
    header = ["method", "trained weights", f"dev {first['metric']}", "s per step", "peak memory", "checkpoint", "lr"]
    lines = [
        [
            METHODS.get(row["method"], "full fine-tuning"),
            f"{int(row['trained_weights']):,}",
            f"{float(row['dev']):.3f}",
            f"{float(row['seconds_per_step']):.3f}",
            _bytes(str(max(int(row["select_memory_bytes"]), int(row["train_memory_bytes"])))),
            f"{int(row['checkpoint_bytes']):,} bytes",
            f"{float(row['lr']):g}",
        ]
        for row in rows
    ]
    return f"{heading}\n\n{_markdown(header, lines)}"


def filled(page: str, name: str, table: str) -> str:
    """Return a page with a table between its markers.

    Raises:
        ValueError: the page does not have the two markers.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the page must hold {begin} and after it {end}")
    return before + begin + "\n" + (f"\n{table}\n\n" if table else "") + end + after


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))


def _seconds(text: str) -> str:
    seconds = float(text)
    for scale, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= scale:
            return f"{_digits(seconds / scale)} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def _bytes(text: str) -> str:
    size = float(text)
    for scale, unit in ((2**20, "MiB"), (2**10, "KiB")):
        if size >= scale:
            return f"{_digits(size / scale)} {unit}"
    return f"{size:.0f} bytes"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(ratio: float, better: str) -> str:
    return f"{_digits(1 / ratio)} x {better}" if ratio < 0.995 else f"{ratio:.2f} x"


def main() -> int:
    """Write the README, or say whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 if the page is out of date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    options = parser.parse_args()
    page = options.readme.read_text(encoding="utf-8")
    wanted = filled(filled(page, "benchmarks", benchmarks(options.results)), "demo", demo(options.results))
    if page == wanted:
        return 0
    if options.check:
        print(f"{options.readme} differs from the rows in {options.results}; run python benchmarks/table.py")
        return 1
    options.readme.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
