"""All methods side by side on real tasks: one line a method, equal budgets, several seeds.

    python benchmarks/compare.py cpu2 --data ../shared/data     # goes on where it stopped: finished runs are skipped
    python benchmarks/compare.py cpu2 --table                   # the rows, as docs/comparison.md has them
    python benchmarks/compare.py cpu2 --data ../shared/data --tasks trec6 --ways fish LoRA --seeds 0

What each line does is in benchmarks/ways.py. For a seed, all start from the same weights and see the same rows in the
same order. Rates are those of docs/comparison.md. Rows go to results/compare-MACHINE.csv.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import compare_table
import provenance
import torch
import ways
from tqdm import tqdm

from sparseft.integrations import encoding, evaluation, examples, models, rows, training

TASKS = ("trec6", "rte")
CASE = ("task", "way", "seed", *compare_table.COMMON, "lr", "head_lr")


def prepare(task: str, seed: int, options: argparse.Namespace) -> ways.Task:
    """Read and encode the rows of a task."""
    train, dev = (rows.read(options.data / task / f"{split}.jsonl") for split in ("train", "dev"))
    splits = examples.prepare(train, dev)
    loaded = models.load(models.minilm(), splits, seed=seed)
    encoded = encoding.encode(splits, loaded.tokenizer, options.max_length)
    same = {name: getattr(options, name) for name in ("density", "epochs", "batch_size", "samples", "bf16")}
    return ways.Task(splits, encoded, seed=seed, **same)


def case(task: str, way: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return what tells a run from others."""
    rates = {"lr": ways.WAYS[way].lr, "head_lr": "" if way == "head" else training.HEAD_LR}
    same = {name: getattr(options, name) for name in CASE if hasattr(options, name)}
    values = {"task": task, "way": way, "seed": seed, **same, **rates}
    return {name: values[name] for name in CASE}


def run(task: ways.Task, name: str) -> dict[str, Any]:
    """Train and measure; return what came of it."""
    way, loaded = ways.WAYS[name], task.load()
    before = {id(p): p.detach().clone() for p in loaded.model.parameters()}
    way.train(task, loaded, way.lr, training.HEAD_LR)
    found = evaluation.evaluate(loaded.model, task.encoded, task.encoded.dev)
    labels = torch.tensor([row["labels"] for row in task.encoded.dev])
    return {
        "steps": task.steps(),
        "changed_weights": changed(loaded.model.parameters(), before),
        "dev_rows": len(labels),
        "dev_accuracy": round(found.metrics["accuracy"], 4),
        "dev_loss": round(float(torch.nn.functional.cross_entropy(found.outputs, labels)), 4),
    }


def changed(parameters: Iterable[torch.nn.Parameter], before: dict[int, torch.Tensor]) -> int:
    """Return how many weights are others than before, what was attached included."""
    return sum(int((p != before[id(p)]).sum()) if id(p) in before else p.numel() for p in parameters)


def run_all(options: argparse.Namespace, path: Path) -> None:
    """Run what is not in the file yet, and add each row as soon as it is there."""
    done = {tuple(row[name] for name in CASE) for row in provenance.read(path)}
    wanted = [
        (task, way, seed)
        for seed, task, way in itertools.product(options.seeds, options.tasks, options.ways)
        if tuple(str(value) for value in case(task, way, seed, options).values()) not in done
    ]
    prepared: dict[tuple[str, int], ways.Task] = {}
    for task, way, seed in tqdm(wanted, desc="compare", unit="run"):
        if (task, seed) not in prepared:
            prepared = {(task, seed): prepare(task, seed, options)}
        row = {**case(task, way, seed, options), **run(prepared[task, seed], way)}
        provenance.append(path, [{**row, **provenance.stamp()}])
        tqdm.write(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machine", help="name of the results file")
    parser.add_argument("--data", type=Path, help="folder that holds the tasks' folders")
    parser.add_argument("--table", action="store_true", help="run nothing; print the table")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--ways", nargs="+", default=list(ways.WAYS), choices=list(ways.WAYS), metavar="WAY")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--density", type=float, default=0.005)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--samples", type=int, default=256, help="rows that a method looks at")
    parser.add_argument("--bf16", action="store_true", help="train in bf16 autocast")
    options = parser.parse_args()
    path = provenance.RESULTS / f"compare-{options.machine}.csv"
    if options.table:
        print(compare_table.table(compare_table.current(provenance.read(path))))
        return
    if options.data is None:
        parser.error("--data must name the folder of the tasks")
    models.quiet()
    run_all(options, path)


if __name__ == "__main__":
    main()
