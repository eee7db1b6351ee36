"""The folder that `sparseft train` writes, and how a plain transformers model is made of it."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from sparseft import workers
from sparseft.delta import Delta, save_delta
from sparseft.integrations import strict_json
from sparseft.integrations.examples import Splits
from sparseft.integrations.inputs import Inputs
from sparseft.integrations.models import check_source
from sparseft.integrations.training import Result
from sparseft.mask import Mask, versions

DELTA, RESULTS, PREDICTIONS = "delta.safetensors", "results.json", "predictions.jsonl"


def check_output(folder: Path, overwrite: bool) -> None:
    """Raise unless a folder can be written: it is new or empty, or may be overwritten, and its place is writable.

    Raises:
        ValueError: says what stands in the way.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"the output {folder} must be a folder, got a file of that name; choose another")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"the output folder {folder} must be empty or new; choose another, or give --overwrite")
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"the output folder {folder} must be writable: {place} is no folder that may be written to")


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write into; what is in it moves to `folder` at the end, file by file, each at once.

    If anything fails before that, the files in `folder` stay as they were.

    Raises:
        OSError: a file could not be written.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # inside it, because a file cannot be renamed from one file system to another
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as temporary:
            yield Path(temporary)
            for path in sorted(Path(temporary).rglob("*")):
                if path.is_file():
                    target = folder / path.relative_to(temporary)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(path, target)
    finally:
        if new and not any(folder.iterdir()):
            folder.rmdir()


def save_run(folder: Path, inputs: Inputs, mask: Mask | None, run: Result, options: dict[str, Any]) -> dict[str, Any]:
    """Write what `merge` needs: the delta, the config and the tokenizer; and results and dev predictions.

    Without a mask (full fine-tuning) the whole model takes the delta's place.

    Args:
        folder: the folder to write.
        inputs: what the run started from; its model is fine-tuned by now.
        mask: what was trained.
        run: how it went.
        options: plain values to keep with the results.

    Returns:
        What results.json holds, as plain values.
    """
    model = inputs.loaded.model
    with staged(folder) as temporary:
        if mask is None:
            model.save_pretrained(temporary)
        else:
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(temporary)
            save_delta(model, mask, temporary / DELTA, {"base_model": _base(inputs), "task": inputs.splits.task})
        size = sum(path.stat().st_size for path in temporary.glob("*.safetensors"))
        results = {**_results(inputs, mask, run), **options, "checkpoint_bytes": size}
        inputs.loaded.tokenizer.save_pretrained(temporary)
        lines = [strict_json.dumps(row) for row in _predictions(inputs.splits, run.evaluation.outputs)]
        (temporary / PREDICTIONS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        (temporary / RESULTS).write_text(strict_json.dumps(results, indent=1) + "\n", encoding="utf-8")
    # an overwritten folder may hold a run of the other kind
    for stale in folder.glob("model*.safetensors*" if mask is not None else DELTA):
        stale.unlink()
    return results


def merge(
    sources: Sequence[Path],
    output: Path,
    base: str | None = None,
    overlap: workers.Overlap = "error",
    partial: bool = False,
) -> dict[str, Any]:
    """Write the base model with a delta in it, or with those of several workers, as a plain transformers folder.

    Args:
        sources: folders that `save_run` wrote, or delta files; config and tokenizer are those beside the first.
        output: the folder to write.
        base: the base model; None for the one that the deltas name.
        overlap: what happens to entries that are in several deltas; see `sparseft.workers.merge`.
        partial: whether workers of a split may be missing.

    Returns:
        What was merged, as plain values.

    Raises:
        ValueError: there is no delta, its base is unknown or cannot be loaded, the delta is another model's, or
            deltas do not go together, as those of heads that began with different seeds.
    """
    files = [source / DELTA if source.is_dir() else source for source in sources]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} does not exist; give a folder that `sparseft train` wrote, or a delta file")
    _check_labels(files)
    deltas = [Delta.load(file) for file in files]
    _check_seeds(files, deltas)
    delta = workers.merge(deltas, overlap=overlap, partial=partial)
    base = base or delta.mask.info.get("base_model")
    if base is None:
        named = (
            f"{files[0]} does not say which model it belongs to" if len(files) == 1 else "deltas name no common base"
        )
        raise ValueError(f"{named}; name it with --base")
    try:
        check_source(base)
    except ValueError as error:
        raise ValueError(f"the base model is not there: {error}; name it with --base") from error
    model, tokenizer = _load_base(base, files[0].parent)
    delta.apply(model)
    with staged(output) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return {"base_model": base, "deltas": files, "merged": delta.mask.trained, "output": output}


def _check_labels(files: Sequence[Path]) -> None:
    """Raise if the configs beside deltas name other classes: their heads would be averaged class by class."""
    first: Any = None
    for config in (file.parent / "config.json" for file in files):
        if config.is_file():
            labels = json.loads(config.read_text(encoding="utf-8")).get("id2label")
            first = labels if first is None else first
            if labels != first:
                raise ValueError(f"deltas must be of the same classes in one order, got {first} and {labels}")


def _check_seeds(files: Sequence[Path], deltas: Sequence[Delta]) -> None:
    """Raise if the results beside deltas say that new parameters began with other values in each."""
    seeds, new = {}, set()
    for file, delta in zip(files, deltas, strict=True):
        if (file.parent / RESULTS).is_file():
            results = json.loads((file.parent / RESULTS).read_text(encoding="utf-8"))
            seeds[str(file.parent)] = results.get("seed")
            # runs that do not say what was new trained nothing else whole, unless their mask came from elsewhere
            new |= set(results.get("new", delta.mask.dense)) & set(delta.mask.dense)
    if new and len(set(seeds.values())) > 1:
        said = ", ".join(f"{seed} in {folder}" for folder, seed in seeds.items())
        raise ValueError(
            f"deltas must be of runs with one --seed, got {said}: {', '.join(sorted(new))} are new parameters, which "
            "began with different values, and the mean of what came of them is none of it; train again with one --seed"
        )


def _base(inputs: Inputs) -> str:
    # a relative path would mean something else elsewhere, or nothing, and then be taken for a hub id
    folder = Path(inputs.source)
    return str(folder.resolve()) if folder.is_dir() else inputs.source


def _load_base(base: str, beside: Path) -> tuple[Any, Any]:
    """Return the base model, with the head that the config beside the delta describes, and the tokenizer."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(beside if (beside / "config.json").is_file() else base)
        name = (config.architectures or ["none"])[0]
        kind: Any = getattr(transformers, name, None)
        if not issubclass(kind if isinstance(kind, type) else object, transformers.PreTrainedModel):
            raise ValueError(f"its config names the architecture {name!r}, which transformers does not have")
        # a head of another size than the checkpoint's comes whole from the delta
        model = kind.from_pretrained(base, config=config, dtype=config.dtype or "auto", ignore_mismatched_sizes=True)
        has_tokenizer = (beside / "tokenizer_config.json").is_file()
        tokenizer = transformers.AutoTokenizer.from_pretrained(beside if has_tokenizer else base)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"the base model {base} could not be loaded: {reason}; name another with --base") from error
    return model, tokenizer


def _results(inputs: Inputs, mask: Mask | None, run: Result) -> dict[str, Any]:
    plain = {name: value for name, value in vars(run).items() if name != "evaluation"}
    return {
        "task": inputs.splits.task,
        "classes": len(inputs.splits.classes),
        "new": list(inputs.loaded.new),
        "rows": {"train": len(inputs.encoded.train), "dev": len(inputs.encoded.dev)},
        "max_length": inputs.encoded.max_length,
        "dev": run.evaluation.metrics,
        "density": 1.0 if mask is None else mask.density,
        **plain,
        "device": str(inputs.loaded.model.device),
        "versions": versions(),
    }


def _predictions(splits: Splits, outputs: Tensor) -> Iterator[dict[str, Any]]:
    """Yield what the model says to each dev row. fp32 values survive their way through JSON bit for bit."""
    if splits.task == "causal-lm":
        for loss, tokens in outputs.tolist():
            yield {"loss": loss, "tokens": int(tokens)}
        return
    for example, row in zip(splits.dev, outputs.tolist(), strict=True):
        if splits.task == "regression":
            yield {"label": example.label, "prediction": row[0]}
        else:
            best = max(range(len(row)), key=row.__getitem__)
            yield {"label": splits.classes[int(example.label or 0)], "prediction": splits.classes[best], "logits": row}
