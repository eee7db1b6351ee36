"""Fine-tuning through transformers.Trainer: a mask, or one of the two baselines that masks are measured against."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from sparseft.compact import compact_gradients
from sparseft.delta import save_delta
from sparseft.integrations import measure
from sparseft.integrations.encoding import Encoded
from sparseft.integrations.evaluation import Evaluation, evaluate
from sparseft.integrations.fitting import fit
from sparseft.integrations.models import Loaded, device
from sparseft.mask import Mask
from sparseft.optim import SparseAdamW

# Peak learning rates: of the lowest held-out loss in one sweep (benchmarks/results/sweep-*.csv), or within 2 % of it,
# as one rate for methods that choose alike. Sparse methods want far higher ones than full fine-tuning, and a new head,
# which starts from nothing, a higher one than weights that know something.
DEFAULT_LR = {
    "fish": 1e-3,
    "ird": 1e-3,  # was not swept: as for fish, whose entries are of the same kind
    "sift": 1e-3,
    "child_tuning": 1e-3,
    "gps": 1e-3,
    "snip": 1e-3,
    "bitfit": 3e-3,
    "magnitude": 1e-2,
    "wanda": 3e-3,
    "random": 3e-2,
    "head": 1e-1,
    "full": 1e-4,
}
HEAD_LR = 3e-2  # of new parameters, beside any method


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

    AdamW and the learning rates' course (see `fit`) are the same for every method.

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
        RuntimeError: training diverged: the loss is not finite for many steps, or the outputs after it.
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
        clock = fit(model, encoded, optimizer, steps, batch_size=batch_size, bf16=bf16, seed=seed, progress=progress)
        peak = measure.peak_memory()
    evaluation = evaluate(model, encoded, encoded.dev, progress=progress)
    if not bool(torch.isfinite(evaluation.outputs).all()):
        raise RuntimeError(f"training diverged at learning rate {lr}: the outputs are not finite; choose a lower one")
    trained = sum(parameter.numel() for parameter in model.parameters()) if mask is None else mask.trained
    size = checkpoint_bytes(model, mask)
    return Result(str(method), lr, head_lr, trained, evaluation, steps, clock.median, peak, size)


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
