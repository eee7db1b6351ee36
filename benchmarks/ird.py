"""IRD beside FISH, reverse IRD and random entries, at the same numbers of samples and weights.

    python benchmarks/ird.py cpu2 --data ../shared/data        # goes on where it stopped: finished runs are skipped
    python benchmarks/ird.py cpu2 --table                      # what the rows say
    python benchmarks/ird.py cpu2 --data ../shared/data --choose --tasks rte sst2 --samples 32 --densities 0.005

A run trains an encoder with one mask and measures it on dev rows. For a seed, every method sees the same training
rows in the same order, starts from the same weights, and has the same number of weights in a cell: seeds pair up. FISH
takes the first N samples of a shuffled pool; IRD starts from the whole pool and twice the largest density, and halves
its way down the grid; random entries look at no samples, so that one run serves all N. Cells are given, not chosen,
and no search sees a dev row. Rows go to results/ird-MACHINE.csv. --choose trains nothing and says what the options of
the sample score keep: rows of results/ird-samples-MACHINE.csv.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ird_table
import provenance
import torch

from sparseft.integrations import encoding, examples, models, rows, training
from sparseft.mask import Mask
from sparseft.selection import IRDPath, ird_search, select
from sparseft.selection.ird.ranking import halved
from sparseft.selection.top_k import count_at

TRAIN_FILES = {"rte": "train.jsonl", "mrpc": "train.jsonl", "sst2": "train_sentences.jsonl"}
# method -> options of the search; None for those that do not search
SEARCHES: dict[str, dict[str, Any] | None] = {
    "ird": {},
    "fish": None,
    "reverse": {"reverse": "samples"},
    "random": None,
    "ird-balanced": {"class_balance": True},
    "ird-length": {"length_normalisation": True},
    "ird-cap": {"influence_cap": 2.0},
}
DEFAULT_METHODS = ("ird", "fish", "reverse", "random")
CASE = ("task", "method", "samples", "density", "seed", "train_rows", "max_length", "epochs", "pool", "bf16")


class Bench:
    """The masks of one task and seed, each made when it is first asked for."""

    def __init__(self, task: str, seed: int, options: argparse.Namespace) -> None:
        self.task, self.seed, self.options = task, seed, options
        folder = options.data / task
        train, dev = (rows.read(folder / name) for name in (TRAIN_FILES[task], "dev.jsonl"))
        train = random.Random(seed).sample(train, min(len(train), options.train_rows))
        dev = random.Random(0).sample(dev, min(len(dev), options.dev_rows))
        self.splits = examples.prepare(train, dev)
        loaded = self.load()
        self.encoded = encoding.encode(self.splits, loaded.tokenizer, options.max_length)
        self.pool = random.Random(seed + 1).sample(self.encoded.train, min(len(train), options.pool))
        self._paths: dict[str, IRDPath] = {}

    def load(self) -> models.Loaded:
        """Load the model as every run starts with it."""
        return models.load(self.options.model, self.splits, seed=self.seed)

    def mask(self, method: str, samples: int, density: float) -> tuple[Mask, list[int]]:
        """Return a cell's mask, and which of the pool's samples chose it."""
        search = SEARCHES[method]
        if search is not None:
            path = self._path(method)
            number = self._number(path, samples, density)
            return path.masks[number], list(path.cells[number].positions)
        loaded = self.load()
        entries = sum(p.numel() for name, p in loaded.model.named_parameters() if name not in loaded.new)
        mask = select(
            method,
            loaded.model,
            self._batches(),
            k=self._count(entries, density),
            dense=loaded.new,
            seed=self.seed,
            progress=False,
            **({"samples": samples} if method == "fish" else {}),
        )
        return mask, list(range(samples)) if method == "fish" else []

    def _count(self, entries: int, density: float) -> int:
        """Return the weights in a cell, as IRD gets there: halving rounds up."""
        densities = self.options.densities
        count, least = (count_at(share, entries) for share in (2 * max(densities), min(densities)))
        ladder = [count]
        while ladder[-1] > least:
            ladder.append(halved(ladder[-1], least))
        return min(ladder, key=lambda each: abs(each - density * entries))

    def _path(self, method: str) -> IRDPath:
        if method not in self._paths:
            loaded, options = self.load(), self.options
            self._paths[method] = ird_search(
                loaded.model,
                self._batches(),
                2 * max(options.densities),
                dense=loaded.new,
                samples=len(self.pool),
                min_samples=min(options.samples),
                min_density=min(options.densities),
                order="grid",
                select_by="ladder",
                progress=False,
                seed=self.seed,
                **(SEARCHES[method] or {}),
            )
        return self._paths[method]

    def _number(self, path: IRDPath, samples: int, density: float) -> int:
        """Return the number of a cell; halving rounds up, so densities are met but for an entry or two."""
        for number, cell in enumerate(path.cells):
            if cell.samples == samples and abs(cell.density / density - 1) < 1e-3:
                return number
        found = sorted({(cell.samples, f"{cell.density:.4%}") for cell in path.cells})
        raise ValueError(f"{samples} samples at {density:.4%} are not on the way down: cells are {found}")

    def _batches(self) -> Any:
        return self.encoded.batches(self.pool, self.options.batch_size, models.device())

    def run(self, method: str, samples: int, density: float) -> dict[str, Any]:
        """Choose, train and measure; return a row."""
        started = time.perf_counter()
        mask, chosen = self.mask(method, samples or min(self.options.samples), density)
        loaded, options = self.load(), self.options
        result = training.train(
            loaded,
            self.encoded,
            mask,
            epochs=options.epochs,
            batch_size=options.batch_size,
            bf16=options.bf16,
            seed=self.seed,
            progress=False,
        )
        outputs = result.evaluation.outputs
        labels = torch.tensor([row["labels"] for row in self.encoded.dev])
        return {
            **self.case(method, samples, density),
            "weights": mask.k,
            "lr": result.lr,
            "head_lr": result.head_lr,
            "steps": result.steps,
            "dev_rows": len(self.encoded.dev),
            "dev_accuracy": round(result.evaluation.metrics["accuracy"], 4),
            "dev_loss": round(float(torch.nn.functional.cross_entropy(outputs, labels)), 4),
            **self.kept(chosen),
            "seconds": round(time.perf_counter() - started, 1),
        }

    def case(self, method: str, samples: int, density: float) -> dict[str, Any]:
        """Return what tells a run from others."""
        options = self.options
        values = (self.task, method, samples, density, self.seed, options.train_rows, options.max_length)
        return dict(zip(CASE, (*values, options.epochs, options.pool, options.bf16), strict=True))

    def kept(self, chosen: list[int]) -> dict[str, Any]:
        """Say what the samples that chose are like: their length beside the pool's, and their largest class."""
        if not chosen:
            return {"kept_length": "", "kept_largest_class": ""}
        length = [len(row["input_ids"]) for row in self.pool]
        labels = [self.pool[i]["labels"] for i in chosen]
        return {
            "kept_length": round(statistics.mean(length[i] for i in chosen) / statistics.mean(length), 3),
            "kept_largest_class": round(max(labels.count(label) for label in set(labels)) / len(labels), 3),
        }


def cells(options: argparse.Namespace) -> Iterator[tuple[str, int, float]]:
    """Yield (method, samples, density); samples 0 for random entries, which look at none."""
    for density, method in itertools.product(options.densities, options.methods):
        for samples in [0] if method == "random" else options.samples:
            yield method, samples, density


def run_all(options: argparse.Namespace, path: Path) -> None:
    """Run what is not in the file yet, and add each row as soon as it is there."""
    for seed, task in itertools.product(options.seeds, options.tasks):
        done = {tuple(row[name] for name in CASE) for row in provenance.read(path)}
        bench = None
        for method, samples, density in cells(options):
            values = (task, method, samples, density, seed, options.train_rows, options.max_length)
            if tuple(map(str, (*values, options.epochs, options.pool, options.bf16))) in done:
                continue
            bench = bench or Bench(task, seed, options)
            row = bench.run(method, samples, density)
            provenance.append(path, [{**row, **provenance.stamp()}])
            print(json.dumps(row), flush=True)


def choose_all(options: argparse.Namespace, path: Path) -> None:
    """For every way to score samples, say which it keeps, and what that does to the mask; add rows."""
    for seed, task in itertools.product(options.seeds, options.tasks):
        bench = Bench(task, seed, options)
        for samples, density in itertools.product(options.samples, options.densities):
            plain, _ = bench.mask("ird", samples, density)
            found = []
            for method, search in SEARCHES.items():
                if search is not None:
                    mask, chosen = bench.mask(method, samples, density)
                    overlap = {"overlap_with_ird": round(mask.overlap(plain), 3)}
                    found.append({**bench.case(method, samples, density), **bench.kept(chosen), **overlap})
                    print(json.dumps(found[-1]), flush=True)
            provenance.append(path, [{**row, **provenance.stamp()} for row in found])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machine", help="name of the results file")
    parser.add_argument("--results", type=Path, default=provenance.RESULTS, help="folder of results files")
    parser.add_argument("--table", action="store_true", help="print what the rows say, and run nothing")
    parser.add_argument("--choose", action="store_true", help="only look at what scores of samples keep")
    parser.add_argument("--data", type=Path, help="folder that holds the tasks' folders")
    parser.add_argument("--model", default=None, help="folder or hub id; MiniLM if left out")
    parser.add_argument("--tasks", nargs="+", default=list(TRAIN_FILES), choices=TRAIN_FILES)
    parser.add_argument("--methods", nargs="+", default=list(DEFAULT_METHODS), choices=SEARCHES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--samples", nargs="+", type=int, default=[128, 32, 8])
    parser.add_argument("--densities", nargs="+", type=float, default=[0.005, 0.00125])
    parser.add_argument("--pool", type=int, default=256, help="samples that IRD starts from")
    parser.add_argument("--train-rows", type=int, default=512)
    parser.add_argument("--dev-rows", type=int, default=400, help="at most; the same for every run")
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="train in bf16 autocast")
    options = parser.parse_args()
    path = options.results / f"ird-{options.machine}.csv"
    if options.table:
        found = provenance.read(path)
        if not found:
            sys.exit(f"{path} has no rows; run without --table first")
        print(ird_table.table(found, list(SEARCHES)))
        return
    if options.data is None:
        parser.error("--data is missing: the folder that holds the tasks' folders")
    options.results.mkdir(parents=True, exist_ok=True)
    options.model = options.model or models.minilm()
    models.quiet()
    if options.choose:
        choose_all(options, options.results / f"ird-samples-{options.machine}.csv")
    else:
        run_all(options, path)


if __name__ == "__main__":
    main()
