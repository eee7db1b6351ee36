"""Try one grid of learning rates for every method: where the default rates of `sparseft train` come from.

    python benchmarks/sweep.py cpu2            # adds rows to results/sweep-cpu2.csv, some minutes on two cores

The rows are short runs on the demo's training rows alone: a part of them is held out to measure on, so that the demo's
own dev rows have no say in the choice. Every rate starts from the same weights, mask, seed and order of rows.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from typing import Any

import provenance
import torch
import ways

from sparseft.integrations import encoding, evaluation, examples, models, training

sys.path.append(str(provenance.ROOT / "examples"))
import docstrings

# from too slow for any method to too fast for any, by half decades
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
HELD_OUT = 0.2


def held_out(seed: int) -> examples.Splits:
    """Return the demo's training rows, part of them set apart to measure on."""
    data = docstrings.build(seed)
    order = random.Random(seed + 1).sample(data.train, len(data.train))
    count = round(HELD_OUT * len(order))
    return examples.prepare(order[count:], order[:count])


def try_rates(name: str, rates: list[float], splits: examples.Splits, options: argparse.Namespace) -> None:
    """Train once for each rate from the same start, and record each run as soon as it ends."""
    task = prepare(splits, options)
    for rate in rates:
        loaded, started = task.load(), time.perf_counter()
        try:
            ways.WAYS[name].train(task, loaded, rate, options.head_lr)
            found = evaluation.evaluate(loaded.model, task.encoded, task.encoded.dev)
            accuracy, loss = found.metrics["accuracy"], _loss(found.outputs, task.encoded.dev)
        except RuntimeError as error:
            if "diverged" not in str(error):
                raise
            accuracy, loss = 0.0, float("inf")
        row = {
            "method": name,
            "lr": rate,
            "head_lr": rate if name == "head" else options.head_lr,
            "accuracy": round(accuracy, 4),
            "loss": round(loss, 4),
            "density": options.density,
            "steps": options.steps,
            "batch_size": options.batch_size,
            "max_length": options.max_length,
            "seed": options.seed,
            "train_rows": len(task.encoded.train),
            "held_out_rows": len(task.encoded.dev),
            "seconds": round(time.perf_counter() - started, 1),
            **provenance.stamp(),
        }
        provenance.append(provenance.RESULTS / f"sweep-{options.machine}.csv", [row])
        print(f"{name:15} {rate:7.0e}  accuracy {accuracy:.3f}  loss {loss:.3f}  {row['seconds']:.0f} s", flush=True)


def prepare(splits: examples.Splits, options: argparse.Namespace) -> ways.Task:
    """Encode the rows; a method looks at as many of them as by default it does in the command."""
    tokenizer = models.load(models.minilm(), splits, seed=options.seed).tokenizer
    encoded = encoding.encode(splits, tokenizer, options.max_length)
    same = {name: getattr(options, name) for name in ("density", "batch_size", "samples", "seed")}
    return ways.Task(splits, encoded, max_steps=options.steps, **same)


def _loss(outputs: torch.Tensor, rows: list[dict[str, Any]]) -> float:
    """Return the mean cross-entropy in nats."""
    return float(torch.nn.functional.cross_entropy(outputs, torch.tensor([row["labels"] for row in rows])))


def main() -> None:
    """Read the command line and try every method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("machine", help="name of the results file")
    parser.add_argument("--methods", nargs="+", choices=list(ways.WAYS), default=list(ways.WAYS), metavar="WAY")
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--head-lr", type=float, default=training.HEAD_LR)
    parser.add_argument("--density", type=float, default=0.005)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=40)
    parser.add_argument("--samples", type=int, default=1024, help="rows that a method looks at")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    models.quiet()
    splits = held_out(options.seed)
    for method in options.methods:
        try_rates(method, options.rates, splits, options)


if __name__ == "__main__":
    main()
