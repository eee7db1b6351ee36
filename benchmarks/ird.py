"""IRD beside FISH, reverse IRD and random entries, at the same numbers of samples and weights.

    python benchmarks/ird.py cpu2 --data ../shared/data        # goes on where it stopped: finished runs are skipped
    python benchmarks/ird.py cpu2 --table                      # what the rows say
    python benchmarks/ird.py cpu2 --data ../shared/data --majority              # the largest classes of the dev rows
    python benchmarks/ird.py cpu2 --data ../shared/data --choose --flip 0.1     # what the sample scores keep

A run trains an encoder with one mask and measures it on dev rows. For a seed, every method sees the same training
rows in the same order, starts from the same weights, and has the same number of weights in a cell: seeds pair up. FISH
takes the first N samples of a shuffled pool; IRD starts from the whole pool and twice the largest density, and halves
its way down the grid; random entries look at no samples, so that one run serves all N. Cells are given, not chosen,
and no search sees a dev row. Rows go to results/ird-MACHINE.csv. --choose trains no mask and says what the options of
the sample score keep: rows of results/ird-samples-MACHINE.csv. There a share of the pool's labels may be wrong, and
the model may have been tuned on the other rows first: a head that is new likes no label better than another.
--majority writes results/ird-majority-MACHINE.csv.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ird_samples_table
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
    "ird-cap-2": {"influence_cap": 2.0},
    "ird-cap-1": {"influence_cap": 1.0},
}
DEFAULT_METHODS = ("ird", "fish", "reverse", "random")
CASE = ("task", "method", "samples", "density", "seed", "train_rows", "max_length", "epochs", "pool", "bf16")
CHOICE = (*CASE, "flip", "tuned")


class Bench:
    """The masks of one task and seed, each made when it is first asked for."""

    def __init__(self, task: str, seed: int, options: argparse.Namespace) -> None:
        self.task, self.seed, self.options = task, seed, options
        folder = options.data / task
        train = rows.read(folder / TRAIN_FILES[task])
        train = random.Random(seed).sample(train, min(len(train), options.train_rows))
        self.splits = examples.prepare(train, dev_rows(task, options))
        self._tuned: dict[str, torch.Tensor] = {}
        loaded = self.load()
        self.encoded = encoding.encode(self.splits, loaded.tokenizer, options.max_length)
        places = random.Random(seed + 1).sample(range(len(train)), min(len(train), options.pool))
        self.pool = [self.encoded.train[place] for place in places]
        self.wrong: set[int] = set()
        self._paths: dict[str, IRDPath] = {}
        self._others = [row for place, row in enumerate(self.encoded.train) if place not in set(places)]

    def load(self) -> models.Loaded:
        """Load the model as every run starts with it."""
        loaded = models.load(self.options.model, self.splits, seed=self.seed)
        if self._tuned:
            loaded.model.load_state_dict(self._tuned)
        return loaded

    def tune(self) -> float:
        """Start from a model that was fine-tuned whole on the rows outside the pool; return its dev accuracy."""
        loaded = self.load()
        result = self._train(loaded, dataclasses.replace(self.encoded, train=self._others), None)
        self._tuned = {name: value.cpu() for name, value in loaded.model.state_dict().items()}
        return result.evaluation.metrics["accuracy"]

    def _train(self, loaded: models.Loaded, encoded: Any, mask: Mask | None) -> Any:
        options = self.options
        return training.train(
            loaded,
            encoded,
            mask,
            epochs=options.epochs,
            batch_size=options.batch_size,
            bf16=options.bf16,
            seed=self.seed,
            progress=False,
        )

    def flip(self, share: float) -> None:
        """Give a share of the pool's samples another class than theirs."""
        draw = random.Random(self.seed + 2)
        classes = len(self.splits.classes)
        self.wrong = set(draw.sample(range(len(self.pool)), round(share * len(self.pool))))
        for place in sorted(self.wrong):
            other = (self.pool[place]["labels"] + draw.randrange(1, classes)) % classes
            self.pool[place] = {**self.pool[place], "labels": other}

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
        result = self._train(self.load(), self.encoded, mask)
        outputs = result.evaluation.outputs
        labels = torch.tensor([row["labels"] for row in self.encoded.dev])
        return {
            **case(self.task, self.seed, method, samples, density, self.options),
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

    def kept(self, chosen: list[int]) -> dict[str, Any]:
        """Say what the samples that chose are like: their length beside the pool's, and their largest class."""
        if not chosen:
            return {"kept_length": "", "kept_largest_class": ""}
        length = [len(row["input_ids"]) for row in self.pool]
        return {
            "kept_length": round(statistics.mean(length[i] for i in chosen) / statistics.mean(length), 3),
            "kept_largest_class": round(largest_class(self.pool[i]["labels"] for i in chosen), 3),
        }

    def choose(self, method: str, samples: int, density: float) -> dict[str, Any]:
        """Say which samples a method keeps, and what that does to the mask."""
        mask, chosen = self.mask(method, samples, density)
        plain, _ = self.mask("ird", samples, density)
        return {
            **self.kept(chosen),
            "pool_largest_class": round(largest_class(row["labels"] for row in self.pool), 3),
            "overlap_with_ird": round(mask.overlap(plain), 3),
            "capped": len(mask.info["capped"]),
            "wrong_in_pool": len(self.wrong),
            "wrong_kept": len(self.wrong & set(chosen)),
        }


def case(
    task: str, seed: int, method: str, samples: int, density: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Return what tells a run from others."""
    values = (task, method, samples, density, seed, options.train_rows, options.max_length)
    return dict(zip(CASE, (*values, options.epochs, options.pool, options.bf16), strict=True))


def dev_rows(task: str, options: argparse.Namespace) -> list[rows.Row]:
    """Return the rows that every run of a task is measured on."""
    found = rows.read(options.data / task / "dev.jsonl")
    return random.Random(0).sample(found, min(len(found), options.dev_rows))


def largest_class(labels: Iterable[Any]) -> float:
    """Return the share of the most frequent label."""
    counts = collections.Counter(labels)
    return max(counts.values()) / counts.total()


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
            if tuple(map(str, case(task, seed, method, samples, density, options).values())) in done:
                continue
            bench = bench or Bench(task, seed, options)
            row = bench.run(method, samples, density)
            provenance.append(path, [{**row, **provenance.stamp()}])
            print(json.dumps(row), flush=True)


def choose_all(options: argparse.Namespace, path: Path) -> None:
    """For every way to score samples, say which it keeps, and what that does to the mask; add the rows not there."""
    methods = [method for method, search in SEARCHES.items() if search is not None]
    for seed, task in itertools.product(options.seeds, options.tasks):
        done = {tuple(row[name] for name in CHOICE) for row in provenance.read(path)}
        bench, start = None, {}
        for method, samples, density in itertools.product(methods, options.samples, options.densities):
            row = case(task, seed, method, samples, density, options)
            row |= {"flip": options.flip, "tuned": options.tuned}
            if tuple(map(str, row.values())) in done:
                continue
            if bench is None:
                bench = Bench(task, seed, options)
                start = {"start_dev_accuracy": round(bench.tune(), 4) if options.tuned else ""}
                bench.flip(options.flip)
            row |= {**start, **bench.choose(method, samples, density)}
            provenance.append(path, [{**row, **provenance.stamp()}])
            print(json.dumps(row), flush=True)


def majority_all(options: argparse.Namespace, path: Path) -> None:
    """Add the share of the largest class among each task's dev rows: what a constant answer reaches."""
    done = {(row["task"], row["dev_rows"]) for row in provenance.read(path)}
    for task in options.tasks:
        labels = [row["label"] for row in dev_rows(task, options)]
        if (task, str(len(labels))) not in done:
            row = {"task": task, "dev_rows": len(labels), "largest_class": round(largest_class(labels), 4)}
            provenance.append(path, [{**row, **provenance.stamp()}])
            print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machine", help="name of the results file")
    parser.add_argument("--results", type=Path, default=provenance.RESULTS, help="folder of results files")
    parser.add_argument("--table", action="store_true", help="print what the rows say, and run nothing")
    parser.add_argument("--choose", action="store_true", help="only look at what scores of samples keep")
    parser.add_argument("--majority", action="store_true", help="only count the classes of the dev rows")
    parser.add_argument("--flip", type=float, default=0.0, help="with --choose: share of the pool's labels made wrong")
    parser.add_argument("--tuned", action="store_true", help="with --choose: tune on the other rows before choosing")
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
    majorities, choices = (options.results / f"ird-{name}-{options.machine}.csv" for name in ("majority", "samples"))
    if options.table:
        found = provenance.read(path)
        if not found:
            sys.exit(f"{path} has no rows; run without --table first")
        print(ird_table.table(found, list(SEARCHES), provenance.read(majorities)))
        print("\n" + ird_samples_table.table(provenance.read(choices), list(SEARCHES)))
        return
    if not options.choose and (options.flip or options.tuned):
        parser.error("--flip and --tuned go with --choose")
    if options.data is None:
        parser.error("--data is missing: the folder that holds the tasks' folders")
    options.results.mkdir(parents=True, exist_ok=True)
    options.model = options.model or models.minilm()
    models.quiet()
    if options.majority:
        majority_all(options, majorities)
    elif options.choose:
        choose_all(options, choices)
    else:
        run_all(options, path)


if __name__ == "__main__":
    main()
