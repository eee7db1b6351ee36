"""Fine-tune an encoder on RTE and SST-2 through the command, merge, and check what plain transformers then predicts.

    python benchmarks/glue.py cpu2 --data ../shared/data              # FISH at 0.5 %, about half an hour
    python benchmarks/glue.py cpu2 --data ../shared/data --tasks rte --methods fish full --seeds 0 1 2

`--data` holds a folder a task with `train.jsonl` and `dev.jsonl`. Rows go to benchmarks/results/glue-<machine>.csv.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import provenance
import torch
import transformers

from sparseft.integrations import models

# SST-2's file of whole sentences: GLUE's own training rows are phrases cut from them
TRAIN_FILES = {"rte": "train.jsonl", "sst2": "train_sentences.jsonl"}


def command(*arguments: Any) -> dict[str, Any]:
    """Run the command as a user does; return its results line."""
    program = Path(sys.executable).parent / "sparseft"
    done = subprocess.run([program, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True)
    (line,) = done.stdout.splitlines()
    return json.loads(line)


@torch.no_grad()
def plain_logits(folder: Path, dev: Path, max_length: int, batch_size: int = 32) -> torch.Tensor:
    """Return what transformers alone, without this package, gives for the rows of a file: [rows, classes]."""
    rows = [json.loads(line) for line in dev.read_text(encoding="utf-8").splitlines()]
    columns = [name for name in ("text", "text_a", "text_b") if name in rows[0]]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    logits = []
    for start in range(0, len(rows), batch_size):
        texts = [[row[name] for row in rows[start : start + batch_size]] for name in columns]
        batch = tokenizer(*texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        logits.append(model(**batch).logits)
    return torch.cat(logits)


def measure(task: str, method: str, seed: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train, merge and check; return a row.

    Raises:
        RuntimeError: the merged model does not give the logits that the trained one gave.
    """
    train, dev = options.data / task / TRAIN_FILES[task], options.data / task / "dev.jsonl"
    how = ["--method", method, "--epochs", options.epochs, "--seed", seed]
    if method not in ("bitfit", "head", "full"):
        how += ["--density", options.density]
    found = command("train", options.model, "--train", train, "--dev", dev, *how, "-o", folder / "trained")
    plain = folder / "trained"
    if method != "full":
        plain = folder / "merged"
        command("merge", folder / "trained", "-o", plain)
    said = [json.loads(line)["logits"] for line in (folder / "trained" / "predictions.jsonl").open()]
    logits, said = plain_logits(plain, dev, found["max_length"]), torch.tensor(said)
    if not torch.equal(logits, said):
        worst, flipped = float((logits - said).abs().max()), int((logits.argmax(1) != said.argmax(1)).sum())
        raise RuntimeError(f"{task}: the merged model's logits differ by up to {worst}, {flipped} predictions flip")
    return {
        "task": task,
        "train_rows": found["rows"]["train"],
        "dev_rows": found["rows"]["dev"],
        "method": method,
        "density": found["density"],
        "seed": seed,
        "lr": found["lr"],
        "epochs": options.epochs,
        "steps": found["steps"],
        "dev_accuracy": found["dev"]["accuracy"],
        "merged_logits": "identical",
        "trained_weights": found["trained"],
        "checkpoint_bytes": found["checkpoint_bytes"],
        "select_seconds": round(found["select_seconds"], 2),
        "seconds_per_step": round(found["seconds_per_step"], 4),
        "peak_memory_bytes": found["peak_memory"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machine", help="name of the results file")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the tasks' folders")
    parser.add_argument("--model", default=None, help="folder or hub id; MiniLM if left out")
    parser.add_argument("--tasks", nargs="+", default=list(TRAIN_FILES), choices=TRAIN_FILES)
    parser.add_argument("--methods", nargs="+", default=["fish"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--density", type=float, default=0.005)
    parser.add_argument("--epochs", type=float, default=3.0)
    options = parser.parse_args()
    options.model = options.model or models.minilm()
    for task in options.tasks:
        for method in options.methods:
            for seed in options.seeds:
                with tempfile.TemporaryDirectory() as folder:
                    row = measure(task, method, seed, options, Path(folder))
                print(json.dumps(row), flush=True)
                provenance.append(provenance.RESULTS / f"glue-{options.machine}.csv", [{**row, **provenance.stamp()}])


if __name__ == "__main__":
    main()
