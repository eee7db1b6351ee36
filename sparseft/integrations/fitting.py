"""Training steps, by transformers.Trainer."""

from __future__ import annotations

import math
import tempfile
from typing import TYPE_CHECKING, Any

from sparseft.integrations.encoding import Encoded

if TYPE_CHECKING:
    import torch

    from sparseft.integrations.clock import Clock

WARMUP = 0.1  # share of the steps


def fit(
    model: Any,
    encoded: Encoded,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    batch_size: int = 16,
    bf16: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Clock:
    """Train a model on the training rows with an optimizer of any kind, by transformers.Trainer, and time the steps.

    Learning rates rise linearly to those of the optimizer's groups over a tenth of the steps, then fall linearly to
    zero. Gradients are not clipped.

    Args:
        model: where it is to train; left in training mode.
        encoded: the data.
        optimizer: of the model's parameters, with or without a schedule of its mask.
        steps: number of optimizer steps; the rows begin anew as often as needed.
        batch_size: rows a step.
        bf16: run forward and backward in bf16 autocast.
        seed: order of the rows and dropout.
        progress: show a progress bar on stderr.

    Raises:
        RuntimeError: training diverged: the loss was not finite for many steps on end.
    """
    from transformers import PrinterCallback, TrainingArguments, get_linear_schedule_with_warmup

    from sparseft.integrations.clock import Clock
    from sparseft.integrations.watching import WatchedTrainer

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
            use_cpu=model.device.type == "cpu",
        )
        # one process trains on one device: DataParallel would multiply the batch
        arguments._n_gpu = min(arguments.n_gpu, 1)
        trainer = WatchedTrainer(
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
