"""Write the tables of the pages from the rows in results/; --check only compares.

A page gets the tables whose markers it holds. So a figure without a row cannot get into a page, and a row that changed
cannot be left out of it.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import compare_table
import ird_samples_table
import ird_table
import provenance
import record

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "docs" / "comparison.md")
OTHERS = ("alone-", "compare-", "demo-", "glue-", "ird-", "operations-", "sweep-")
# what a newcomer asks first: op, pattern of its case, unit, baselines (all if none is named)
HEADLINES = (
    ("estimate_fisher", "MiniLM, 4 x 16 x 128 tokens", "s", ("forward + backward", "loop of batch 1, published")),
    ("estimate_fisher", "MiniLM, 16 x 128 tokens, beside peers", "s", ()),
    (
        "training_step",
        "MiniLM.*",
        "s",
        ("full, fused AdamW", "peft LoRA, rank 1", "peft SHiRA, rank 1", "peft Super-Tuning"),
    ),
    ("adamw_", "25 M weights in 25 tensors(, step after step)?", "s", ()),
    ("adamw_", "25 M weights in 25 tensors", "bytes", ()),
    ("topk_indices", ".*", "s", ()),
    ("save_delta", ".*", "bytes", ()),
)
IRD = ("ird", "fish", "reverse", "random")
METHODS = {"head": "head only", "random": "random", "magnitude": "magnitude", "sift": "SIFT", "fish": "FISH"}
Row = record.Row


def benchmarks(folder: Path) -> str:
    """Return a table a machine: each implementation beside each of its baselines, newest measurement of each case."""
    files = sorted(file for file in folder.glob("*.csv") if not file.name.startswith(OTHERS))
    return "\n\n".join(_machine(record.read(file)) for file in files)


def headlines(folder: Path) -> str:
    """Return the few lines of `benchmarks` that a newcomer asks for first."""
    files = sorted(file for file in folder.glob("*.csv") if not file.name.startswith(OTHERS))
    tables = [[row for row in record.read(file) if _is_headline(row)] for file in files]
    return "\n\n".join(_machine(rows) for rows in tables if rows)


def _is_headline(row: Row) -> bool:
    return any(
        row["op"] == op
        and re.fullmatch(shape, row["shape"])
        and row["unit"] == unit
        and row["density"] in ("", "0.005")
        and (row["role"] == "ours" or not baselines or row["backend"] in baselines)
        for op, shape, unit, baselines in HEADLINES
    )


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
        rows = provenance.read(file)
        run = [row for row in rows if (row["commit"], row["date"]) == (rows[-1]["commit"], rows[-1]["date"])]
        seeds: dict[str, dict[str, Row]] = {}
        for row in run:
            seeds.setdefault(row["method"], {})[row["seed"]] = row
        blocks.append(_demo_table([list(rows.values()) for rows in seeds.values()]))
    return "\n\n".join(blocks)


def _demo_table(methods: list[list[Row]]) -> str:
    """Return a line a method, of its rows, one a seed: means, and the standard deviation of what was reached."""
    first = methods[0][0]
    seeds = f", {len(methods[0])} seeds" if len(methods[0]) > 1 else ""
    heading = (
        f"Measured on {first['device']}; torch {first['torch']}, transformers {first['transformers']}; "
        f"commit {first['commit']}, {first['date']}{seeds}:"
    )
    header = ["method", "trained weights", f"dev {first['metric']}", "s per step", "peak memory", "checkpoint", "lr"]
    lines = []
    for rows in methods:
        row, reached = rows[-1], [float(each["dev"]) for each in rows]
        peak = max(int(each[f"{part}_memory_bytes"]) for each in rows for part in ("select", "train"))
        spread = f" ± {statistics.stdev(reached):.3f}" if len(rows) > 1 else ""
        lines.append(
            [
                METHODS.get(row["method"], "full fine-tuning"),
                f"{int(row['trained_weights']):,}",
                f"{statistics.mean(reached):.3f}{spread}",
                f"{statistics.median(float(each['seconds_per_step']) for each in rows):.3f}",
                _bytes(str(peak)),
                f"{int(row['checkpoint_bytes']):,} bytes",
                f"{float(row['lr']):g}",
            ]
        )
    return f"{heading}\n\n{_markdown(header, lines)}"


def ird(folder: Path) -> str:
    """Return what the rows of ird.py say, a table a machine, and one of the options of the sample score."""
    blocks = []
    for file in sorted(folder.glob("ird-*.csv")):
        if not file.name.startswith(("ird-samples-", "ird-majority-")):
            rows = provenance.read(file)
            main = [row for row in rows if row["method"] in IRD]
            majority = provenance.read(file.with_name(file.name.replace("ird-", "ird-majority-", 1)))
            blocks.append(f"{_ran(main, 'runs')}\n\n{ird_table.table(main, IRD, majority)}")
            if others := [row for row in rows if row["method"] in ird_table.OPTIONS]:
                heading = _ran(others, "runs with other scores of samples")
                blocks.append(f"{heading}\n\n{ird_table.options(rows)}")
    return "\n\n".join(blocks)


def ird_samples(folder: Path) -> str:
    """Return what the rows of ird.py --choose say, tables a machine."""
    files = sorted(folder.glob("ird-samples-*.csv"))
    found = [provenance.read(file) for file in files]
    order = ["ird", "reverse", *ird_table.OPTIONS]
    return "\n\n".join(f"{_ran(rows, 'searches')}\n\n{ird_samples_table.table(rows, order)}" for rows in found)


def _ran(rows: list[Row], what: str) -> str:
    seen = ", ".join(dict.fromkeys(f"{row['device']}; torch {row['torch']}" for row in rows))
    dates = sorted({row["date"] for row in rows})
    return f"{len(rows)} {what}, measured on {seen}; {dates[0]} to {dates[-1]}:"


def comparison(folder: Path) -> str:
    """Return what the rows of compare.py say, a table a machine."""
    blocks = []
    for file in sorted(folder.glob("compare-*.csv")):
        rows = compare_table.current(provenance.read(file))
        seen = ", ".join(dict.fromkeys(row["device"] for row in rows))
        versions = f"torch {rows[-1]['torch']}, transformers {rows[-1]['transformers']}"
        heading = f"{len(rows)} runs on {seen}; {versions}; until {max(row['date'] for row in rows)}:"
        blocks.append(f"{heading}\n\n{compare_table.table(rows)}")
    return "\n\n".join(blocks)


TABLES: dict[str, Callable[[Path], str]] = {
    "benchmarks": benchmarks,
    "headlines": headlines,
    "demo": demo,
    "ird": ird,
    "ird_samples": ird_samples,
    "comparison": comparison,
}


def filled(page: str, results: Path) -> str:
    """Return a page with each table between its markers.

    Raises:
        ValueError: the page has no markers, or none of a known table, or one without its end.
    """
    names = re.findall(r"<!-- (\w+):begin -->", page)
    if not names or not TABLES.keys() >= set(names):
        wanted = ", ".join(f"<!-- {name}:begin -->" for name in TABLES)
        raise ValueError(f"the page must hold one of {wanted}, got {', '.join(names) or 'none'}")
    for name in names:
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, _, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not closed:
            raise ValueError(f"the page must hold {end} after {begin}")
        table = TABLES[name](results)
        page = before + begin + "\n" + (f"\n{table}\n\n" if table else "") + end + after
    return page


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
    """Write the pages, or say whether they are up to date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", type=Path, nargs="*", default=PAGES)
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 if a page is out of date")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    options = parser.parse_args()
    code = 0
    for path in options.pages:
        page = path.read_text(encoding="utf-8")
        wanted = filled(page, options.results)
        if page != wanted and options.check:
            print(f"{path} differs from the rows in {options.results}; run python benchmarks/table.py")
            code = 1
        elif page != wanted:
            path.write_text(wanted, encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
