"""Every way to fine-tune that is compared: selection methods, schedules, design spaces, chosen rows, baselines.

A way changes a freshly loaded model and returns the weights it trained and the rates it took. Its budget is a share of
the model's pretrained weights; what has none, or another one by definition, says so in WAYS.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

import torch

import sparseft
from sparseft import data as data_selection
from sparseft import schedules
from sparseft.design_space import Space
from sparseft.integrations import choosing, encoding, examples, models, training
from sparseft.integrations.design_space import apply_space
from sparseft.integrations.fitting import fit
from sparseft.mask import Mask

FULL_LR, FISH_LR = training.DEFAULT_LR["full"], training.DEFAULT_LR["fish"]
ATTACHED_LR = 3e-3  # from the sweep
SHARE = 0.3  # of the training rows, where rows are chosen


@dataclasses.dataclass
class Task:
    """Data and options of a run; the same for every way."""

    splits: examples.Splits
    encoded: encoding.Encoded
    density: float = 0.005
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 16
    samples: int = 256
    bf16: bool = False
    seed: int = 0

    def load(self) -> models.Loaded:
        """Load the model as every run starts with it, where it is going to train."""
        loaded = models.load(models.minilm(), self.splits, seed=self.seed)
        loaded.model.to(models.device())
        return loaded

    def steps(self, rows: int | None = None) -> int:
        """Return the optimizer steps of a run over so many rows, by default all."""
        count = len(self.encoded.train) if rows is None else rows
        return self.max_steps or math.ceil(math.ceil(count / self.batch_size) * self.epochs)

    def batches(self) -> Any:
        """Return the training rows in batches, shuffled by the seed."""
        return self.encoded.batches(self.encoded.train, self.batch_size, models.device(), self.seed)

    def budget(self, loaded: models.Loaded) -> int:
        """Return the number of weights that the density stands for."""
        return int(self.density * sum(p.numel() for n, p in loaded.model.named_parameters() if n not in loaded.new))

    def fit(self, model: Any, encoded: encoding.Encoded, optimizer: torch.optim.Optimizer, steps: int) -> None:
        """Train with a new course of the learning rates."""
        for group in optimizer.param_groups:
            group["lr"] = group.pop("initial_lr", group["lr"])
        options = {"batch_size": self.batch_size, "bf16": self.bf16, "seed": self.seed}
        fit(model, encoded, optimizer, steps, **options, progress=False)


Train = Callable[[Task, models.Loaded, float, float], None]


@dataclasses.dataclass(frozen=True)
class Way:
    """One line of the comparison.

    Attributes:
        budget: what trains, in words, for a share of 0.5 %.
        lr: peak learning rate of pretrained weights and of what is attached.
        train: (task, loaded, lr, head_lr); changes the model.
    """

    budget: str
    lr: float
    train: Train


def selected(method: str, **options: Any) -> Train:
    """Train a mask of `sparseft.select`, or a baseline, as `sparseft train` does."""

    def train(task: Task, loaded: models.Loaded, lr: float, head_lr: float) -> None:
        density = None if method in ("bitfit", *choosing.BASELINES) else task.density
        samples = task.samples if method in choosing.SAMPLING else None
        kept = {"batch_size": task.batch_size, "seed": task.seed, "progress": False}
        mask = choosing.choose(loaded, task.encoded, method, density, samples=samples, **kept, **options)
        train_mask(task, loaded, task.encoded, mask, lr, head_lr)

    return train


def train_mask(
    task: Task, loaded: models.Loaded, encoded: encoding.Encoded, mask: Mask | None, lr: float, head_lr: float
) -> None:
    """Train a mask with compact gradients, or everything if there is none."""
    head_only = mask is not None and mask.info.get("method") == "head"
    training.train(
        loaded,
        encoded,
        mask,
        lr=lr,
        head_lr=None if head_only else head_lr,
        max_steps=task.steps(len(encoded.train)),
        batch_size=task.batch_size,
        bf16=task.bf16,
        seed=task.seed,
        progress=False,
    )


def whole(loaded: models.Loaded, lr: float, head_lr: float) -> sparseft.SparseAdamW:
    """Return an optimizer of whole parameters, as the schedules of everything begin with it."""
    named = dict(loaded.model.named_parameters())
    new = [named.pop(name) for name in loaded.new]
    return sparseft.SparseAdamW([{"params": list(named.values())}, {"params": new, "lr": head_lr}], lr=lr)


def of_everything(make: Callable[[Task, models.Loaded, Any, int], schedules.Schedule]) -> Train:
    """Train by a schedule that begins with whole parameters."""

    def train(task: Task, loaded: models.Loaded, lr: float, head_lr: float) -> None:
        optimizer = whole(loaded, lr, head_lr)
        with make(task, loaded, optimizer, task.steps()):
            task.fit(loaded.model, task.encoded, optimizer, task.steps())

    return train


def from_fish(make: Callable[[Task, models.Loaded, Any, Mask, int], schedules.Schedule]) -> Train:
    """Train by a schedule that begins with a mask of FISH."""

    def train(task: Task, loaded: models.Loaded, lr: float, head_lr: float) -> None:
        mask = fish(task, loaded)
        groups = mask.param_groups(loaded.model)
        groups[-1]["lr"] = head_lr
        optimizer = sparseft.SparseAdamW(groups, lr=lr)
        with make(task, loaded, optimizer, mask, task.steps()):
            task.fit(loaded.model, task.encoded, optimizer, task.steps())

    return train


def fish(task: Task, loaded: models.Loaded) -> Mask:
    """Return FISH's mask of the task's first samples."""
    options = {"density": task.density, "samples": task.samples, "dense": loaded.new, "seed": task.seed}
    return sparseft.select("fish", loaded.model, task.batches(), progress=False, **options)


def in_two_phases(make: Callable[[Task, models.Loaded, Any, int], schedules.Schedule]) -> Train:
    """Half of the steps for everything, at its rate, half for what was chosen, each with a course of its own."""

    def train(task: Task, loaded: models.Loaded, lr: float, head_lr: float) -> None:
        optimizer, half = whole(loaded, FULL_LR, head_lr), task.steps() // 2
        with make(task, loaded, optimizer, half):
            task.fit(loaded.model, task.encoded, optimizer, half)
            optimizer.param_groups[0]["initial_lr"] = lr
            task.fit(loaded.model, task.encoded, optimizer, task.steps() - half)

    return train


def lt_sft(task: Task, loaded: models.Loaded, optimizer: Any, half: int) -> schedules.Schedule:
    return schedules.LTSFT(loaded.model, optimizer, task.density, half, dense=loaded.new)


def diff_pruning(task: Task, loaded: models.Loaded, optimizer: Any, half: int) -> schedules.Schedule:
    return schedules.DiffPruning(loaded.model, optimizer, task.density, half, dense=loaded.new, seed=task.seed)


def refreshed(task: Task, loaded: models.Loaded, optimizer: Any, mask: Mask, steps: int) -> schedules.Schedule:
    """Choose by FISH again at every quarter of the run."""
    options = {"every": max(1, steps // 4), "samples": task.samples, "seed": task.seed, "progress": False}
    return schedules.Refresh.by_method(loaded.model, optimizer, mask, "fish", task.batches(), **options)


def drop_and_grow(task: Task, loaded: models.Loaded, optimizer: Any, mask: Mask, steps: int) -> schedules.Schedule:
    """Exchange entries ten times in a run, fewer and fewer until seven tenths of it."""
    every = max(1, steps // 10)
    return schedules.DropGrow(loaded.model, optimizer, mask, every=every, until=7 * every)


def child_tuning_f(task: Task, loaded: models.Loaded, optimizer: Any, steps: int) -> schedules.Schedule:
    return schedules.ChildTuningF(loaded.model, optimizer, 0.3, exclude=loaded.new, seed=task.seed)


def dps(task: Task, loaded: models.Loaded, optimizer: Any, steps: int) -> schedules.Schedule:
    return schedules.DPS(loaded.model, optimizer, 0.7, total_steps=steps, dense=loaded.new)


def dps_mix(task: Task, loaded: models.Loaded, optimizer: Any, steps: int) -> schedules.Schedule:
    return schedules.DPSMix(loaded.model, optimizer, 0.7, total_steps=steps, dense=loaded.new, seed=task.seed)


def mixout(task: Task, loaded: models.Loaded, optimizer: Any, steps: int) -> schedules.Schedule:
    heads = [name for name in loaded.new if name.endswith("weight")]
    return schedules.Mixout(loaded.model, optimizer, 0.9, exclude=heads, seed=task.seed)


def by_space(space: Space) -> Train:
    """Train what a design space says, with as many weights in the layers as the density stands for.

    They are fewer where there are no selected entries: ranks and sizes seldom come out even.
    """

    def train(task: Task, loaded: models.Loaded, lr: float, head_lr: float) -> None:
        sparse = any("S" in letters for letters in space.strategies)
        options = {"method": "fish", "samples": task.samples} if sparse else {}
        applied = apply_space(
            space,
            loaded.model,
            task.budget(loaded),
            task.batches(),
            dense=loaded.new,
            seed=task.seed,
            progress=False,
            remainder="leave",
            **options,
        )
        named = dict(loaded.model.named_parameters())
        head = {id(named[name]) for name in applied.outside}
        with sparseft.compact_gradients(loaded.model, applied.mask):
            groups = applied.mask.param_groups(loaded.model)
            *others, attached = groups
            parts = [[p for p in attached["params"] if (id(p) in head) == flag] for flag in (False, True)]
            groups = [*others, {"params": parts[0]}, {"params": parts[1], "lr": head_lr}]
            optimizer = sparseft.SparseAdamW(groups, lr=lr)
            task.fit(loaded.model, task.encoded, optimizer, task.steps())

    return train


def on_rows(choose: Callable[[Task, models.Loaded, int], list[int]]) -> Train:
    """Choose a share of the training rows, and FISH's mask by them; train on them as many steps as others on all."""

    def train(task: Task, loaded: models.Loaded, lr: float, head_lr: float) -> None:
        chosen = choose(task, loaded, round(SHARE * len(task.encoded.train)))
        rows = [task.encoded.train[index] for index in chosen]
        subset = dataclasses.replace(
            task, encoded=dataclasses.replace(task.encoded, train=rows), max_steps=task.steps()
        )
        selected("fish")(subset, loaded, lr, head_lr)

    return train


@torch.no_grad()
def by_facility_location(task: Task, loaded: models.Loaded, count: int) -> list[int]:
    """DELIFT's first stage over embeddings of the pretrained model: mean of the last hidden states over tokens."""
    model = loaded.model.eval()
    found = []
    for batch in task.encoded.batches(task.encoded.train, 64, models.device()):
        batch.pop("labels")
        states = model.base_model(**batch).last_hidden_state
        weights = batch["attention_mask"][:, :, None].to(states)
        found.append((states * weights).sum(1) / weights.sum(1))
    kernel = data_selection.embedding_kernel(torch.cat(found).cpu())
    return list(data_selection.instruction_tuning(kernel, count).indices)


def at_random(task: Task, loaded: models.Loaded, count: int) -> list[int]:
    """As many rows, drawn."""
    return random.Random(task.seed).sample(range(len(task.encoded.train)), count)


WAYS: dict[str, Way] = {
    **{
        method: Way({"bitfit": "all biases", "ird": "at most 0.5 %"}.get(method, "0.5 %"), rate, selected(method))
        for method, rate in training.DEFAULT_LR.items()
        if method not in choosing.BASELINES
    },
    "LT-SFT": Way("all, then 0.5 %", FISH_LR, in_two_phases(lt_sft)),
    "diff pruning": Way("all, then 0.5 %", FISH_LR, in_two_phases(diff_pruning)),
    "drop and grow": Way("0.5 % at a time", FISH_LR, from_fish(drop_and_grow)),
    "FISH, refreshed": Way("0.5 % at a time", FISH_LR, from_fish(refreshed)),
    "Child-Tuning-F": Way("all, 30 % of the gradients a step", FULL_LR, of_everything(child_tuning_f)),
    "DPS": Way("all, and 70 % of linear layers, in turn", FULL_LR, of_everything(dps)),
    "DPS Mix": Way("all, and 70 % of linear layers, in turn", FULL_LR, of_everything(dps_mix)),
    "Mixout": Way("all", FULL_LR, of_everything(mixout)),
    "S4": Way("at most 0.5 %", ATTACHED_LR, by_space(Space.preset("s4"))),
    "S4 and sparse": Way("0.5 %", ATTACHED_LR, by_space(Space(("ALS", "APS", "ABPS", "BLPS")))),
    "LoRA": Way("at most 0.5 %", ATTACHED_LR, by_space(Space(("L",)))),
    "DELIFT": Way("0.5 %, 30 % of the rows", FISH_LR, on_rows(by_facility_location)),
    "random rows": Way("0.5 %, 30 % of the rows", FISH_LR, on_rows(at_random)),
    "head": Way("the head", training.DEFAULT_LR["head"], selected("head")),
    "full": Way("all", FULL_LR, selected("full")),
}
