"""The IRD benchmark: rows already there are not run again, and the table says what the rows say."""

import argparse
import csv
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("ird", "ird_table", "provenance"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("ird")


def rows(accuracies, method, samples=32, density=0.005, task="rte"):
    return [
        {
            "task": task,
            "method": method,
            "samples": str(samples),
            "density": str(density),
            "seed": str(seed),
            "dev_accuracy": str(accuracy),
            "dev_loss": str(1 - accuracy),
        }
        for seed, accuracy in enumerate(accuracies)
    ]


def test_the_table_pairs_seeds_and_counts_cells(bench):
    found = [
        *rows([0.60, 0.62, 0.64], "ird"),
        *rows([0.55, 0.58, 0.58], "fish"),
        *rows([0.60, 0.50], "ird", samples=8),
        *rows([0.50, 0.62, 0.90], "fish", samples=8),
        *rows([0.70, 0.50, 0.70], "random", samples=0),
    ]
    text = bench.ird_table.table(found, list(bench.SEARCHES)).splitlines()
    assert text[0] == "| task | samples | density | ird | fish | random |"
    assert text[2] == "| rte | 8 | 0.5 % | 55.0 ± 7.1 (2) | 67.3 ± 20.5 (3) | 63.3 ± 11.5 (3) |"
    assert text[3] == "| rte | 32 | 0.5 % | 62.0 ± 2.0 (3) | 57.0 ± 1.7 (3) | 63.3 ± 11.5 (3) |"
    # differences to FISH: 5, 4, 6 and, of two seeds, 10, -12
    assert (
        "- dev accuracy, IRD and fish: ahead in 1 of 2 cells and behind in 1, by more than twice the standard error "
        "in 1 and 0; +2.600 points over all 5 pairs"
    ) in text
    assert any(line.startswith("- dev loss, IRD and fish: ahead in 1 of 2 cells") for line in text)
    assert any("+0.026 nats (positive: IRD's loss is lower)" in line for line in text)


def test_finished_runs_are_skipped(bench, tmp_path, monkeypatch):
    options = argparse.Namespace(
        seeds=[0, 1],
        tasks=["rte"],
        methods=["ird", "fish", "random"],
        samples=[32, 8],
        densities=[0.005],
        train_rows=512,
        max_length=64,
        epochs=2.0,
        pool=256,
        bf16=True,
    )
    ran = []

    class Bench:
        def __init__(self, task, seed, options):
            self.task, self.seed = task, seed

        def run(self, method, samples, density):
            ran.append((self.seed, method, samples))
            if len(ran) == 7:
                raise KeyboardInterrupt
            values = (self.task, method, samples, density, self.seed, 512, 64, 2.0, 256, True)
            return {**dict(zip(bench.CASE, values, strict=True)), "dev_accuracy": 0.5}

    monkeypatch.setattr(bench, "Bench", Bench)
    monkeypatch.setattr(bench.provenance, "stamp", dict)
    path = tmp_path / "ird-here.csv"
    with pytest.raises(KeyboardInterrupt):
        bench.run_all(options, path)
    bench.run_all(options, path)
    every = [
        (seed, m, n) for seed in (0, 1) for m, n in (("ird", 32), ("ird", 8), ("fish", 32), ("fish", 8), ("random", 0))
    ]
    assert sorted(set(ran)) == sorted(every)
    assert len(ran) == len(every) + 1
    with path.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(every)
    bench.run_all(options, path)
    assert len(ran) == len(every) + 1
