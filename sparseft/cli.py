"""The `sparseft` command.

Standard output gets one line of JSON, the results; progress, tables and errors go to standard error.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from sparseft.mask import Mask

_EXTRA = ("transformers", "accelerate", "datasets")


class _Commands(TyperGroup):
    """Turns what goes wrong into one line and an exit code: 2 for wrong input, 1 for the rest."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except (ValueError, TypeError, FileNotFoundError) as error:
            _fail(error, 2, ctx.params["debug"])
        except (RuntimeError, OSError) as error:
            _fail(error, 1, ctx.params["debug"])
        except ModuleNotFoundError as error:
            if error.name not in _EXTRA:
                raise
            missing = f"{error.name} is not installed; pip install 'sparseft[train]'"
            _fail(missing, 1, ctx.params["debug"])


_ROWS = "a .jsonl, .json, .csv or .tsv file, or a folder or NAME[@CONFIG][:SPLIT] for the datasets library"
_Model = Annotated[str, typer.Argument(help="Folder or hub id of a transformers model.")]
_Train = Annotated[str, typer.Option("--train", help=f"Rows to train on: {_ROWS}.")]
_Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write; it must be new or empty.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output.")]
_Task = Annotated[
    Literal["auto", "classification", "regression", "causal-lm"],
    typer.Option(help="auto goes by the labels: names or integers, floats, or none."),
]
_Texts = Annotated[
    list[str] | None,
    typer.Option("--text-column", help="Column of the text; repeat for a second text, or for causal-lm the answer."),
]
_Label = Annotated[str | None, typer.Option("--label-column", help="Column of the label.")]
_METHODS = "fish, ird, child_tuning, gps, sift, snip, wanda, magnitude, bitfit, random"
_Density = Annotated[
    float | None,
    typer.Option(
        help="Share of the weights to select, in (0, 1]; 0.005 if left out. bitfit, head and full have none."
    ),
]
_Scope = Annotated[
    Literal["global", "layer", "tensor", "row", "column", "block"] | None,
    typer.Option(help="Rank all weights together, or those of each of these; the method's own if left out."),
]
_Structure = Annotated[
    Literal["row", "column", "block"] | None, typer.Option(help="Select whole units in place of single weights.")
]
_Block = Annotated[
    tuple[int, int] | None,
    typer.Option(metavar="ROWS COLUMNS", help="Rows and columns of a block, two numbers: --block 4 4, for instance."),
]
_Include = Annotated[list[str] | None, typer.Option(help="Select only in parameters named like this; repeatable.")]
_Exclude = Annotated[list[str] | None, typer.Option(help="Do not select in parameters named like this; repeatable.")]
_Samples = Annotated[int | None, typer.Option(min=1, help="Rows that the method looks at.")]
_Batch = Annotated[int, typer.Option("--batch-size", min=1, help="Rows at a time.")]
_Length = Annotated[
    int | None, typer.Option("--max-length", min=2, help="Tokens after which a sequence is cut; 128 if left out.")
]
_Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: as the model is stored.")
]
_Seed = Annotated[int, typer.Option(min=0, help="Of a new head, the order of rows, dropout, and the choice.")]

app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command."""
    app()


def _version(asked: bool) -> None:
    if asked:
        import sparseft

        typer.echo(sparseft.__version__)
        raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version, help="Show it.")] = False,
) -> None:
    """Fine-tune a model by changing 0.01-10 % of its weights in place.

    Each command prints one line of JSON to standard output. Exit codes: 0 done, 2 wrong input, 1 failure.
    """


@app.command(epilog="Example: sparseft train ./model --train rte/train.jsonl --dev rte/dev.jsonl --output rte-fish")
def train(
    ctx: typer.Context,
    model: _Model,
    train_rows: _Train,
    dev_rows: Annotated[str, typer.Option("--dev", help="Rows to measure on, given like --train.")],
    output: _Output,
    task: _Task = "auto",
    text_columns: _Texts = None,
    label_column: _Label = None,
    method: Annotated[str, typer.Option(help=f"{_METHODS}; or as a baseline head or full.")] = "fish",
    density: _Density = None,
    include: _Include = None,
    exclude: _Exclude = None,
    scope: _Scope = None,
    structure: _Structure = None,
    block: _Block = None,
    samples: _Samples = None,
    mask_file: Annotated[
        Path | None, typer.Option("--mask", help="Train this mask, from `sparseft select`, instead of choosing one.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the training rows.")] = 3.0,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Number of steps, in place of --epochs.")] = None,
    batch_size: _Batch = 16,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; the method's own if left out.")] = None,
    head_lr: Annotated[float | None, typer.Option(help="Peak learning rate of a new head beside others.")] = None,
    max_length: _Length = None,
    dtype: _Dtype = "auto",
    bf16: Annotated[bool, typer.Option("--bf16", help="Train in bf16 autocast, whatever the weights' dtype.")] = False,
    seed: _Seed = 0,
    overwrite: _Overwrite = False,
) -> None:
    """Choose weights, train them, measure, and write the delta."""
    with _results() as results:
        from sparseft.integrations import checkpoint, choosing, inputs, models, training

        checkpoint.check_output(output, overwrite)
        choosing.check_choice(method, density, samples, scope, structure, block, include, exclude)
        training.check_schedule(lr, epochs, max_steps, batch_size, head_lr)
        mask = None if mask_file is None else _given_mask(mask_file, ctx)
        models.quiet()
        found = inputs.load(model, train_rows, dev_rows, **_taken_by(inputs.load, ctx))
        started = time.perf_counter()
        if mask is not None:
            mask.check(found.loaded.model, weights=True)
        else:
            mask = choosing.choose(found.loaded, found.encoded, method, density, **_taken_by(choosing.choose, ctx))
        select_seconds = time.perf_counter() - started
        run = training.train(found.loaded, found.encoded, mask, **_taken_by(training.train, ctx))
        options = {"model": model, "batch_size": batch_size, "seed": seed, "output": output}
        results |= checkpoint.save_run(output, found, mask, run, {**options, "select_seconds": select_seconds})


@app.command(epilog="Example: sparseft select ./model --train rte/train.jsonl --output rte-fish.mask")
def select(
    ctx: typer.Context,
    model: _Model,
    train_rows: _Train,
    output: Annotated[Path, typer.Option("--output", "-o", help="Mask file to write.")],
    task: _Task = "auto",
    text_columns: _Texts = None,
    label_column: _Label = None,
    method: Annotated[str, typer.Option(help=f"{_METHODS}, or head.")] = "fish",
    density: _Density = None,
    include: _Include = None,
    exclude: _Exclude = None,
    scope: _Scope = None,
    structure: _Structure = None,
    block: _Block = None,
    samples: _Samples = None,
    batch_size: _Batch = 16,
    max_length: _Length = None,
    dtype: _Dtype = "auto",
    seed: _Seed = 0,
    overwrite: _Overwrite = False,
) -> None:
    """Choose weights and write the mask, for `sparseft train --mask` or `sparseft.Mask.load`."""
    with _results() as results:
        from sparseft.integrations import choosing, inputs, models

        choosing.check_choice(method, density, samples, scope, structure, block, include, exclude)
        if output.is_dir() or (output.exists() and not overwrite):
            raise ValueError(f"the output {output} must be a new file; choose another, or give --overwrite")
        if not output.absolute().parent.is_dir():
            raise ValueError(f"the output {output} must lie in a folder that exists; make {output.parent} first")
        models.quiet()
        found = inputs.load(model, train_rows, None, **_taken_by(inputs.load, ctx))
        mask = choosing.choose(found.loaded, found.encoded, method, density, **_taken_by(choosing.choose, ctx))
        if mask is None:
            raise ValueError("method 'full' trains everything and has no mask; choose another")
        mask.save(output)
        results |= {"output": output, "bytes": output.stat().st_size, **_described(mask)}


@app.command(epilog="Example: sparseft merge rte-fish --output rte-merged")
def merge(
    sources: Annotated[
        list[Path], typer.Argument(help="Folders that `sparseft train` wrote, or delta files; several are of workers.")
    ],
    output: _Output,
    base: Annotated[str | None, typer.Option(help="Base model; the one the deltas name if left out.")] = None,
    overlap: Annotated[
        Literal["error", "mean"], typer.Option(help="What becomes of selected entries that are in several deltas.")
    ] = "error",
    partial: Annotated[bool, typer.Option("--partial", help="Workers of a split may be missing.")] = False,
    overwrite: _Overwrite = False,
) -> None:
    """Put a delta, or those of several workers, into the base model and write a plain transformers folder."""
    with _results() as results:
        from sparseft.integrations import checkpoint, models

        models.quiet()
        checkpoint.check_output(output, overwrite)
        results |= checkpoint.merge(sources, output, base, overlap, partial)


@app.command(epilog="Example: sparseft inspect rte-fish/delta.safetensors")
def inspect(
    file: Annotated[Path, typer.Argument(help="Mask or delta file, or a folder that `sparseft train` wrote.")],
) -> None:
    """Show what a mask or delta file holds."""
    with _results() as results:
        from sparseft import files
        from sparseft.delta import Delta
        from sparseft.integrations import checkpoint
        from sparseft.mask import Mask

        file = file / checkpoint.DELTA if file.is_dir() else file
        if not file.is_file():
            raise FileNotFoundError(f"{file} is not a file; give a mask or delta, or a folder that `train` wrote")
        found = files.places(file)[1].get("format", "")
        kinds = {"sparseft mask 1": "mask", "sparseft delta 1": "delta"}
        if found not in kinds:
            raise ValueError(f"{file} must be a mask or delta file, got {found or 'safetensors of another program'!r}")
        kind = kinds[found]
        mask = Mask.load(file) if kind == "mask" else Delta.load(file).mask
        results |= {"kind": kind, "bytes": file.stat().st_size, **_described(mask), "info": mask.info}


@app.command(epilog="Example: sparseft doctor")
def doctor() -> None:
    """Show who serves each op on each device, and how to get what is missing.

    Exit code 1 if an op is not compiled for the CPU.
    """
    with _results() as results:
        from sparseft import doctor as ops

        results |= ops.report()
        typer.echo(ops.table(results), err=True)
    if not results["ok"]:
        raise typer.Exit(1)


def _given_mask(file: Path, ctx: typer.Context) -> Mask:
    from sparseft.mask import Mask

    for name in ("method", "density", "include", "exclude", "scope", "structure", "block", "samples"):
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"--{name} must be left out with --mask, which holds a choice already made")
    return Mask.load(file)


def _taken_by(function: Callable[..., Any], ctx: typer.Context) -> dict[str, Any]:
    """Return the options of this call that a function takes as keywords; options and keywords have the same names."""
    keywords = [name for name, p in signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY]
    return {name: ctx.params[name] for name in keywords if ctx.params.get(name) is not None}


@contextlib.contextmanager
def _results() -> Iterator[dict[str, Any]]:
    """Collect results, and print them when all went well; whatever else is printed meanwhile goes to stderr."""
    from sparseft.integrations import strict_json

    results: dict[str, Any] = {}
    with contextlib.redirect_stdout(sys.stderr):
        yield results
    typer.echo(strict_json.dumps(results))


def _described(mask: Mask) -> dict[str, Any]:
    """Say what a mask holds: in numbers, and on stderr by parameter."""
    fullest = sorted(mask, key=lambda name: mask[name].numel(), reverse=True)
    for name in fullest[:10]:
        typer.echo(f"{mask[name].numel():>10,} of {math.prod(mask.shapes[name]):>12,}  {name}", err=True)
    counts = {"k": mask.k, "n": mask.n, "density": mask.density, "tensors": len(mask), "trained": mask.trained}
    return {"method": mask.info.get("method"), **counts, "dense": list(mask.dense)}


def _fail(error: Exception | str, code: int, debug: bool) -> None:
    if debug:
        raise
    typer.echo(f"error: {' '.join(str(error).split())}", err=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    main()
