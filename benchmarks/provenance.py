"""Rows of measured figures: what they are stamped with, and where they are kept."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("sparseft", "torch", "transformers")


def stamp() -> dict[str, Any]:
    """Return where, when and with what a figure was measured."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": cuda or f"{processor()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a CSV file, or start it.

    Raises:
        ValueError: the file has other columns; nothing is written.
    """
    columns = list(rows[0])
    there = path.exists()
    if there:
        with path.open(newline="", encoding="utf-8") as file:
            found = next(csv.reader(file), [])
        if found != columns:
            raise ValueError(
                f"{path} must have the columns {columns}, got {found}; move it away, or name another machine"
            )
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if not there:
            writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file; none if it is not there."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def processor() -> str:
    """Return the name of the CPU."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def _commit() -> str:
    """Return the commit, with a + if tracked files other than results and pages differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    others = (":(exclude,top)benchmarks/results", ":(exclude,top,glob)**/*.md")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *others)
    return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
