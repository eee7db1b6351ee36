"""Turn pytest-benchmark's JSON into rows of results/MACHINE.csv.

    pytest benchmarks --benchmark-only --benchmark-json=last.json
    python benchmarks/record.py last.json

A case measured again at the same commit replaces its rows; rows of other commits stay.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = (
    "op", "shape", "density", "dtype", "role", "backend", "median", "p20", "p80", "unit", "ratio",
    "fraction_of_floor", "peak_bytes", "rounds", "device", "python", "torch", "triton", "transformers", "sparseft",
    "commit", "date",
)  # fmt: skip
# what makes a row the same measurement as an older one
CASE = ("op", "shape", "density", "dtype", "device", "unit", "commit")
Row = dict[str, str]


def rows_of(report: dict[str, Any]) -> list[Row]:
    """Return the rows of a whole run.

    Raises:
        ValueError: a benchmark was not made by `harness.compare`.
    """
    foreign = [each["name"] for each in report["benchmarks"] if "case" not in each["extra_info"]]
    if foreign:
        raise ValueError(f"every benchmark must be timed by the `compare` fixture, got others: {', '.join(foreign)}")
    stamp = report["machine_info"]["sparseft"]
    return [row for benchmark in report["benchmarks"] for row in _rows(benchmark, stamp)]


def _rows(benchmark: dict[str, Any], stamp: dict[str, Any]) -> list[Row]:
    """Return our row and one a baseline: their times, then the sizes of what they leave."""
    info = benchmark["extra_info"]
    case = dict(info["case"])
    backend = case.pop("backend")
    same = {
        **case,
        **stamp["versions"],
        "device": stamp[case["device"]],
        "commit": stamp["commit"],
        "date": stamp["date"],
    }
    first = next(iter(info["baselines"]))
    timed = {backend: benchmark["stats"]["data"], **info["baselines"]}
    reference = statistics.median(timed[first])
    rows = []
    for name, seconds in timed.items():
        median = statistics.median(seconds)
        low, _, _, high = statistics.quantiles(seconds, n=5, method="inclusive")
        row = {
            **same,
            "role": "ours" if name == backend else "baseline",
            "backend": name,
            "median": median,
            "p20": low,
            "p80": high,
            "unit": "s",
            "ratio": median / reference,
            "fraction_of_floor": info["floor_seconds"] / median if info["floor_seconds"] else None,
            "peak_bytes": info["peaks"].get(name),
            "rounds": len(seconds),
        }
        rows.append(row)
    for name, size in info["sizes"].items():
        role = "ours" if name == backend else "baseline"
        sized = {"role": role, "backend": name, "median": size, "unit": "bytes", "ratio": size / info["sizes"][first]}
        rows.append({**same, **sized})
    return [{column: _text(row.get(column)) for column in COLUMNS} for row in rows]


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def merged(old: list[Row], new: list[Row]) -> list[Row]:
    """Return the old rows without those that the new ones measure again, then the new ones."""
    again = {tuple(row[column] for column in CASE) for row in new}
    return [row for row in old if tuple(row[column] for column in CASE) not in again] + new


def read(path: Path) -> list[Row]:
    """Return the rows of a results file; none if there is no file.

    Raises:
        ValueError: the file has other columns.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} must have the columns {', '.join(COLUMNS)}, got {reader.fieldnames}")
        return list(reader)


def write(path: Path, rows: list[Row]) -> None:
    """Replace a results file in one move: a reader sees the old rows or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def label(stamp: dict[str, Any]) -> str:
    """Return a short name of a machine: its GPU's, or its number of threads."""
    gpu = stamp["cuda"]
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") if gpu else f"cpu{stamp['threads']}"


def main() -> None:
    """Read the command line and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("--machine", help="name of the results file (default: the GPU's, or cpuTHREADS)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results files")
    options = parser.parse_args()
    report = json.loads(options.report.read_text())
    path = options.results / f"{options.machine or label(report['machine_info']['sparseft'])}.csv"
    rows = rows_of(report)
    write(path, merged(read(path), rows))
    print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
