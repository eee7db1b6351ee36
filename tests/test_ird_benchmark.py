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
    for name in ("ird", "ird_samples_table", "ird_table", "provenance", "table"):
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


def test_a_constant_answer_stands_beside_the_means(bench):
    found = [
        *rows([0.60, 0.62, 0.64], "ird"),
        *rows([0.50, 0.70], "fish"),
        *rows([0.55], "random", samples=0),
        *rows([0.8, 0.8], "ird", task="sst2"),
    ]
    found = [{**row, "dev_rows": "277"} for row in found]
    majority = [
        {"task": "rte", "dev_rows": "400", "largest_class": "0.9"},
        {"task": "rte", "dev_rows": "277", "largest_class": "0.585"},
        {"task": "sst2", "dev_rows": "277", "largest_class": "0.8"},
    ]
    text = bench.ird_table.table(found, list(bench.SEARCHES), majority).splitlines()
    assert text[0] == "| task | samples | density | largest class | ird | fish | random |"
    assert text[2] == "| rte | 32 | 0.5 % | 58.5 | 62.0 ± 2.0 (3) | 60.0 ± 14.1 (2) | 55.0 (1) |"
    assert "- rte: 1 of 3" in text
    assert "- sst2: none of 1, so that differences there rank nothing" in text
    assert "largest class" not in bench.ird_table.table(found, list(bench.SEARCHES))
    with pytest.raises(ValueError, match="majority of mrpc must have a row with 277 dev rows"):
        bench.ird_table.table([{**row, "task": "mrpc"} for row in found], list(bench.SEARCHES), majority)


def test_options_of_the_sample_score_stand_beside_ird(bench):
    plain = [*rows([0.60, 0.62], "ird"), *rows([0.1], "ird", samples=8), *rows([0.5], "fish")]
    assert bench.ird_table.options(plain) == ""
    text = bench.ird_table.options([*plain, *rows([0.64, 0.62], "ird-length")]).splitlines()
    assert text[0] == "| task | samples | density | ird | ird-length |"
    assert text[2] == "| rte | 32 | 0.5 % | 61.0 ± 1.4 (2) | 63.0 ± 1.4 (2) |"
    assert not text[3]
    assert any(
        line.startswith("- dev accuracy, IRD and ird-length: ahead in 0 of 1 cells and behind") for line in text
    )


def choice(method, seed=0, samples=32, **columns):
    row = {
        "task": "rte", "method": method, "samples": samples, "seed": seed, "pool": 128, "flip": 0.0, "tuned": False,
        "start_dev_accuracy": "", "kept_length": 0.5, "kept_largest_class": 0.6, "pool_largest_class": 0.5,
        "overlap_with_ird": 0.9, "capped": 0, "wrong_in_pool": 0, "wrong_kept": 0, **columns,
    }  # fmt: skip
    return {name: str(value) for name, value in row.items()}


def test_what_the_sample_scores_keep_becomes_tables(bench):
    flipped = {"flip": 0.1, "wrong_in_pool": 13}
    tuned = {**flipped, "tuned": True}
    found = [
        choice("ird-length"),
        choice("ird-length", 1, kept_length=0.7, kept_largest_class=0.8, overlap_with_ird=1.0),
        choice("ird", wrong_kept=3, kept_length=9, **flipped),
        choice("ird", wrong_kept=7, start_dev_accuracy=0.75, capped=5, **tuned),
        choice("ird", 1, wrong_kept=12, start_dev_accuracy=0.8, capped=10, **tuned),
        choice("ird", samples=64, wrong_kept=13, start_dev_accuracy=0.75, capped=5, **tuned),
    ]
    text = bench.ird_samples_table.table(found, list(bench.SEARCHES))
    lines = [line for line in text.splitlines() if line.startswith("| rte ")]
    assert lines == [
        "| rte | new head | 32 | ird-length | 60.0 ± 14.1 | 70.0 ± 14.1 | 50.0 ± 0.0 | 95.0 ± 7.1 | 0.0 ± 0.0 |",
        "| rte | new head | 10 % | ird |  | 3.0 of 13 (chance 3.2) | 0.0 |",
        "| rte | tuned, 77.5 % | 10 % | ird | 13.0 of 13 (chance 6.5) | 9.5 ± 3.5 of 13 (chance 3.2) | 6.7 ± 2.9 |",
    ]
    assert "| task | model | made wrong | method | wrong at 64 kept | wrong at 32 kept | capped |" in text
    assert bench.ird_samples_table.table([], list(bench.SEARCHES)) == ""


def test_the_pages_tables_take_the_rows_of_their_files(bench, tmp_path):
    import table

    stamp = {"device": "a CPU", "torch": "2.13.0", "date": "2026-01-02"}
    runs = [*rows([0.60, 0.62], "ird"), *rows([0.5, 0.5], "fish"), *rows([0.64, 0.62], "ird-length")]
    share = {"task": "rte", "dev_rows": 277, "largest_class": 0.5}
    files = {
        "ird-here.csv": [{**row, "dev_rows": 277, **stamp} for row in runs],
        "ird-majority-here.csv": [{**share, **stamp}],
        "ird-samples-here.csv": [{**choice("ird-length"), **stamp}],
    }
    for name, found in files.items():
        bench.provenance.append(tmp_path / name, found)
    text = table.ird(tmp_path).splitlines()
    assert text[0] == "4 runs, measured on a CPU; torch 2.13.0; 2026-01-02 to 2026-01-02:"
    assert "| rte | 32 | 0.5 % | 50.0 | 61.0 ± 1.4 (2) | 50.0 ± 0.0 (2) |" in text
    assert "- rte: 1 of 2" in text
    assert "2 runs with other scores of samples, measured on a CPU; torch 2.13.0; 2026-01-02 to 2026-01-02:" in text
    assert "| rte | 32 | 0.5 % | 61.0 ± 1.4 (2) | 63.0 ± 1.4 (2) |" in text
    text = table.ird_samples(tmp_path)
    assert text.startswith("1 searches, measured on a CPU")
    assert "| rte | new head | 32 | ird-length | 50.0 | 60.0 | 50.0 | 90.0 | 0.0 |" in text


class Features:
    """What Bench.flip looks at."""

    def __init__(self, bench, seed, classes=3, size=128):
        self.bench = bench.Bench.__new__(bench.Bench)
        self.bench.seed, self.bench.wrong = seed, set()
        self.bench.splits = argparse.Namespace(classes=tuple(range(classes)))
        self.bench.pool = [{"input_ids": [1], "labels": number % classes} for number in range(size)]


@pytest.mark.parametrize("classes", [2, 3])
def test_a_share_of_the_labels_is_made_wrong(bench, classes):
    one, same, other = (Features(bench, seed, classes).bench for seed in (0, 0, 1))
    rows_before = list(one.pool)
    for each in (one, same, other):
        each.flip(0.1)
    changed = {n for n, (row, before) in enumerate(zip(one.pool, rows_before, strict=True)) if row != before}
    assert one.wrong == changed
    assert len(changed) == 13
    assert all(0 <= row["labels"] < classes for row in one.pool)
    assert {row["labels"] for row in rows_before} == set(range(classes))
    assert [row["labels"] for row in rows_before] == [number % classes for number in range(128)]
    assert (one.wrong, one.pool) == (same.wrong, same.pool)
    assert one.wrong != other.wrong


def test_choices_already_there_are_skipped(bench, tmp_path, monkeypatch):
    fixed = {"train_rows": 512, "max_length": 64, "epochs": 2.0, "pool": 128, "bf16": True}
    options = argparse.Namespace(
        seeds=[0, 1], tasks=["rte"], samples=[64, 32], densities=[0.005], flip=0.1, tuned=True, **fixed
    )
    made = []

    class Bench:
        def __init__(self, task, seed, options):
            self.seed, self.done = seed, []
            made.append(self)

        def tune(self):
            self.done.append("tune")
            return 0.75

        def flip(self, share):
            self.done.append(share)

        def choose(self, method, samples, density):
            self.done.append((method, samples))
            return {"wrong_kept": 3}

    monkeypatch.setattr(bench, "Bench", Bench)
    monkeypatch.setattr(bench.provenance, "stamp", dict)
    path = tmp_path / "ird-samples-here.csv"
    bench.choose_all(options, path)
    methods = ["ird", "reverse", "ird-balanced", "ird-length", "ird-cap-2", "ird-cap-1"]
    for each in made:
        assert each.done == ["tune", 0.1, *((method, samples) for method in methods for samples in (64, 32))]
    bench.choose_all(options, path)
    assert len(made) == 2
    options.tuned = False
    bench.choose_all(options, path)
    assert len(made) == 4
    assert "tune" not in made[2].done
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["start_dev_accuracy"] for row in found] == ["0.75"] * 24 + [""] * 24
    assert {row["flip"] for row in found} == {"0.1"}


def test_the_largest_class_of_the_dev_rows(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.provenance, "stamp", dict)
    (tmp_path / "rte").mkdir()
    labels = [0, 1, 1, 0, 1]
    lines = [f'{{"text_a": "a", "text_b": "b", "label": {label}}}' for label in labels]
    (tmp_path / "rte" / "dev.jsonl").write_text("\n".join(lines))
    path = tmp_path / "ird-majority-here.csv"
    for most in (400, 400, 1):
        bench.majority_all(argparse.Namespace(data=tmp_path, tasks=["rte"], dev_rows=most), path)
    with path.open(newline="") as file:
        found = [tuple(row.values()) for row in csv.DictReader(file)]
    assert found == [("rte", "5", "0.6"), ("rte", "1", "1.0")]


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
