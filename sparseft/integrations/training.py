"""Fine-tuning through transformers.Trainer: a mask, or one of the two baselines that masks are measured against."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparseft.compact import compact_gradients
from sparseft.delta import save_delta
from sparseft.integrations import measure
from sparseft.integrations.encoding import Encoded
from sparseft.integrations.evaluation import Evaluation, evaluate
from sparseft.integrations.models import Loaded
from sparseft.mask import Mask, fingerprint, versions
from sparseft.optim import SparseAdamW
from sparseft.selection import METHODS as SELECTION_METHODS
from sparseft.selection import select
from sparseft.selection.scopes import Scope, Structure, check_groups
from sparseft.selection.top_k import check_density

if TYPE_CHECKING:
    from sparseft.integrations.clock import Clock

# "head" trains new parameters only, "full" trains everything with torch.optim.AdamW
BASELINES = ("head", "full")
METHODS = (*SELECTION_METHODS, *BASELINES)
SAMPLING = tuple(name for name, method in SELECTION_METHODS.items() if method.needs_data)
DEFAULT_DENSITY = 0.005

# Peak learning rates, from one sweep over all methods (benchmarks/results/sweep-*.csv). Sparse methods want far higher
# ones than full fine-tuning, and a new head, which starts from nothing, a higher one than weights that know something.
# Those of other methods were not swept: they are as for what is chosen in the same way. BitFit's is three times the
# largest of its paper, with which 120 steps on TREC-6 were not enough.
DEFAULT_LR = {
    "fish": 1e-3,
    "ird": 1e-3,  # as for fish: the entries are of the same kind
    "sift": 1e-3,
    "child_tuning": 1e-3,  # as for fish
    "gps": 1e-3,  # as for sift
    "snip": 1e-3,  # as for sift
    "bitfit": 3e-3,
    "magnitude": 1e-2,
    "wanda": 1e-2,  # as for magnitude
    "random": 3e-2,
    "head": 1e-1,
    "full": 3e-4,
}
HEAD_LR = 3e-2  # of new parameters, beside any method
WARMUP = 0.1  # share of the steps


@dataclasses.dataclass(frozen=True)
class Result:
    """What training gave and what it cost.

    Attributes:
        method: the selection method, "head" or "full".
        lr: the peak learning rate of pretrained weights, or of the new ones for "head", which trains no others.
        head_lr: the peak learning rate of new parameters; None where there are none, or no others.
        trained: number of weights that were trained, new parameters included.
        evaluation: of the dev split, after training.
        steps: number of optimizer steps.
        seconds_per_step: median over the steps of forward, backward and update.
        peak_memory: bytes while training; see `measure.peak_memory`.
        checkpoint_bytes: size of the delta file, or of the model's files for full fine-tuning.
    """

    method: str
    lr: float
    head_lr: float | None
    trained: int
    evaluation: Evaluation
    steps: int
    seconds_per_step: float
    peak_memory: int
    checkpoint_bytes: int


def device() -> torch.device:
    """Return where training runs: the CUDA device if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose(
    loaded: Loaded,
    encoded: Encoded,
    method: str = "fish",
    density: float | None = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    scope: Scope | None = None,
    structure: Structure | None = None,
    block: tuple[int, int] | None = None,
    samples: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> Mask | None:
    """Choose which weights to train, looking at training rows only; None stands for all of them (method "full").

    Args:
        loaded: the model; its new parameters train whole, outside the budget.
        encoded: the data.
        method: a selection method, "head" or "full".
        density: selected over selectable weights, in (0, 1]; 0.005 if left out. "bitfit" has none.
        include: patterns of the parameters to select from; all if empty.
        exclude: patterns of parameters to leave out.
        scope: among which weights they are ranked, as for `sparseft.select`; None for the method's own.
        structure: whole units to select, as for `sparseft.select`.
        block: rows and columns of a block.
        samples: rows to look at, for a method that looks at any; None for the method's default.
        batch_size: rows at a time.
        seed: which rows, and a method's own random choices.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: an option is out of range or does not go with the method.
    """
    check_choice(method, density, samples, scope, structure, block)
    if method == "full":
        return None
    if method == "head":
        return _head_mask(loaded)
    options: dict[str, Any] = {}
    if samples is not None:
        by_batch = method in ("sift", "snip")
        options = {"batches": math.ceil(samples / batch_size)} if by_batch else {"samples": samples}
    if method == "gps" and encoded.task != "classification":
        options["objective"] = "task"  # there are no classes to tell apart
    if method != "bitfit":
        options["density"] = DEFAULT_DENSITY if density is None else density
    loaded.model.to(device())
    return select(
        method,
        loaded.model,
        encoded.batches(encoded.train, batch_size, device(), seed),
        dense=loaded.new,
        include=include or None,
        exclude=exclude or None,
        scope=scope,
        structure=structure,
        block=block,
        seed=seed,
        progress=progress,
        **options,
    )


def train(
    loaded: Loaded,
    encoded: Encoded,
    mask: Mask | None,
    *,
    lr: float | None = None,
    head_lr: float | None = None,
    epochs: float = 3.0,
    max_steps: int | None = None,
    batch_size: int = 16,
    weight_decay: float = 0.0,
    bf16: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Result:
    """Fine-tune a model in place, with compact gradients if there is a mask, and measure it on the dev split.

    The schedule is the same for every method: AdamW, a linear warm-up over a tenth of the steps, then linear decay to
    zero; no gradient clipping.

    Args:
        loaded: the model, as it was loaded.
        encoded: the data.
        mask: what to train, from `choose`; None for everything.
        lr: peak learning rate; None for the method's default.
        head_lr: peak learning rate of new parameters that train beside others; None for a default of their own.
        epochs: passes over the training rows.
        max_steps: number of steps, in place of epochs.
        batch_size: rows a step.
        weight_decay: decoupled, of what is trained.
        bf16: run forward and backward in bf16 autocast; weights, gradients and the measuring keep the model's dtype.
        seed: order of the rows and dropout.
        progress: show progress bars on stderr.

    Raises:
        ValueError: an option is out of range, or there is nothing that head_lr is for.
        RuntimeError: the model's outputs are not finite after training.
    """
    method = "full" if mask is None else mask.info.get("method")
    check_schedule(lr, epochs, max_steps, batch_size, head_lr)
    if not encoded.dev:
        raise ValueError("there must be rows to measure on, got none")
    if lr is None:
        if method not in DEFAULT_LR:
            raise ValueError(f"lr must be given: there is no default for a mask of method {method!r}")
        lr = DEFAULT_LR[method]
    model = loaded.model.to(device())
    measure.reset_peak_memory()
    steps = max_steps or math.ceil(math.ceil(len(encoded.train) / batch_size) * epochs)
    with compact_gradients(model, mask) if mask else contextlib.nullcontext():
        groups = _groups(loaded, mask)
        if len(groups) > 1:
            head_lr = groups[-1]["lr"] = head_lr or HEAD_LR
        elif head_lr is not None:
            raise ValueError(
                f"head_lr is for new parameters that train beside others, got {head_lr} for {method}; use lr"
            )
        optimizer = _optimizer(groups, mask, lr, weight_decay)
        clock = _fit(model, encoded, optimizer, steps, batch_size, bf16, seed, progress)
        peak = measure.peak_memory()
    evaluation = evaluate(model, encoded, encoded.dev, progress=progress)
    if not bool(torch.isfinite(evaluation.outputs).all()):
        raise RuntimeError(f"training diverged at learning rate {lr}: the outputs are not finite; choose a lower one")
    trained = sum(parameter.numel() for parameter in model.parameters()) if mask is None else mask.trained
    size = checkpoint_bytes(model, mask)
    return Result(str(method), lr, head_lr, trained, evaluation, steps, clock.median, peak, size)


def check_choice(
    method: str,
    density: float | None = None,
    samples: int | None = None,
    scope: Scope | None = None,
    structure: Structure | None = None,
    block: tuple[int, int] | None = None,
) -> None:
    """Raise unless the method is known, what is in range, and options are given to methods that have them only."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    check_density(DEFAULT_DENSITY if density is None else density)
    if density is not None and method == "bitfit":
        raise ValueError(f"density must be left out for method 'bitfit', which takes all biases; got {density}")
    if samples is not None and method not in SAMPLING:
        raise ValueError(f"samples must be left out for method {method!r}, which looks at no data; got {samples}")
    given = {"scope": scope, "structure": structure, "block": block}
    surplus = [name for name, value in given.items() if value is not None]
    if surplus and method in (*BASELINES, "bitfit"):
        raise ValueError(f"{', '.join(surplus)} must be left out for method {method!r}, which ranks nothing")
    check_groups(scope or "global", structure, block, None, counted=True)


def check_schedule(
    lr: float | None, epochs: float, max_steps: int | None, batch_size: int, head_lr: float | None = None
) -> None:
    """Raise unless every option is positive and finite."""
    options = {"lr": lr, "epochs": epochs, "max_steps": max_steps, "batch_size": batch_size, "head_lr": head_lr}
    for name, value in options.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive, got {value}")


def checkpoint_bytes(model: Any, mask: Mask | None) -> int:
    """Return the bytes on disk of the delta of a mask, or of a whole model's weights."""
    with tempfile.TemporaryDirectory() as folder:
        if mask is None:
            model.save_pretrained(folder)
        else:
            save_delta(model, mask, Path(folder) / "delta.safetensors")
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def _head_mask(loaded: Loaded) -> Mask:
    if not loaded.new:
        raise ValueError("method 'head' needs a model whose head is new, and this one has no new parameter")
    shapes = {name: parameter.shape for name, parameter in loaded.model.named_parameters()}
    rest = {name: shape for name, shape in shapes.items() if name not in loaded.new}
    return Mask(
        {},
        rest,
        dense={name: shapes[name] for name in loaded.new},
        info={"method": "head", "versions": versions()},
        fingerprint=fingerprint(loaded.model, rest),
    )


def _groups(loaded: Loaded, mask: Mask | None) -> list[dict[str, Any]]:
    """Return what trains, new parameters in a group of their own, which is the last."""
    if mask is not None:
        mask.freeze_rest(loaded.model)
        return mask.param_groups(loaded.model)
    named = dict(loaded.model.named_parameters())
    new = [named.pop(name) for name in loaded.new]
    return [{"params": params} for params in (list(named.values()), new) if params]


def _optimizer(
    groups: list[dict[str, Any]], mask: Mask | None, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    if mask is None:
        return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)
    return SparseAdamW(groups, lr=lr, weight_decay=weight_decay)


def _fit(
    model: Any,
    encoded: Encoded,
    optimizer: torch.optim.Optimizer,
    steps: int,
    batch_size: int,
    bf16: bool,
    seed: int,
    progress: bool,
) -> Clock:
    from transformers import PrinterCallback, Trainer, TrainingArguments, get_linear_schedule_with_warmup

    from sparseft.integrations.clock import Clock

    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(WARMUP * steps), steps)
    clock = Clock("train", progress)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            max_grad_norm=0.0,
            bf16=bf16,
            seed=seed,
            # padding is computed like text, and half of a batch in random order is padding
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            use_cpu=device().type == "cpu",
        )
        # one process trains on one device: DataParallel would multiply the batch
        arguments._n_gpu = min(arguments.n_gpu, 1)
        trainer = Trainer(
            model,
            arguments,
            data_collator=encoded.collate,
            train_dataset=encoded.train,
            optimizers=(optimizer, schedule),
            callbacks=[clock],
        )
        # it prints to stdout, which is for results
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        finally:
            # autocast would stay on the model's forward
            trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    return clock
