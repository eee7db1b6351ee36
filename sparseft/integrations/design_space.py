"""Design spaces on a model of transformers: LoRA and prefixes by peft, adapters, biases and selected entries."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.design_space.adapter import BottleneckAdapter, attach_adapter
from sparseft.design_space.costs import heads_of
from sparseft.design_space.entries import choose_entries
from sparseft.design_space.plan import Plan, Remainder, plan
from sparseft.design_space.space import Space, check_space
from sparseft.integrations import prefix
from sparseft.mask import Mask, aliases, fingerprint, match_names, versions, with_rest
from sparseft.selection.arguments import check_model, check_number


@dataclass(frozen=True)
class Applied:
    """A space on a model.

    Attributes:
        plan: how the budget was spent; printed, it is a table.
        mask: what trains: selected entries; biases, LoRA, prefixes, adapters and a head are its `dense`. For
            optimizers, compact_gradients and save_delta.
        outside: parameters that train outside the budget: a head, as a rule.
    """

    plan: Plan
    mask: Mask
    outside: tuple[str, ...]

    def __str__(self) -> str:
        beside = self.mask.trained - self.plan.weights
        return f"{self.plan}\n{self.mask.trained:,} weights train, {beside:,} of them outside the budget"


def apply_space(
    space: Space,
    model: Any,
    budget: int,
    data: Iterable[Any] | None = None,
    *,
    method: str = "fish",
    dense: str | Iterable[str] | None = (),
    lora_targets: Sequence[str] | None = None,
    lora_scale: float = 1.0,
    lora_dropout: float = 0.0,
    stacks: Sequence[str] | None = None,
    remainder: Remainder = "error",
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Applied:
    """Make a model train what a space says, with exactly as many weights as the budget has. In place.

    Selected entries are chosen before anything is attached, so they do not depend on what is. Afterwards only what
    trains has requires_grad, and selected entries need `SparseAdamW` and the like: an ordinary optimizer would
    train their whole parameters. Nothing is changed if an error is raised before the attaching begins.

    Args:
        space: what to train.
        model: a pretrained model of transformers, without adapters.
        budget: number of weights to train in the model's layers.
        data: batches with labels, for methods that need them; read once, so that an iterator will do.
        method: of `sparseft.select`, for selected entries: any that has scores. They are ranked within their group.
        dense: patterns of parameters outside the layers that train whole, outside the budget: a head, as a rule.
        lora_targets: as peft's target_modules; by default what peft takes for this kind of model.
        lora_scale: LoRA's alpha over its rank, the same for every rank.
        lora_dropout: of LoRA's input.
        stacks: names of the model's lists of layers, in place of those found.
        remainder: see `sparseft.design_space.plan`.
        seed: of the selection, and of what is attached.
        progress: show a progress bar where it takes long.
        options: of the method.

    Raises:
        RuntimeError: peft is missing and the space has LoRA or prefixes.
        TypeError: the space or the model is none, or an option of LoRA or the budget no number.
        ValueError: the space does not fit the model or the budget, see `plan`; the selection is refused, see
            `select`; an option of LoRA is out of range; or the model has been adapted before.
    """
    check_space(space)
    check_model(model)
    _check_fresh(model)
    targets = lora_targets if lora_targets is not None else _default_targets(space, model)
    planned: dict[str, Any] = {
        "lora_targets": list(targets),
        "stacks": list(stacks) if stacks is not None and not isinstance(stacks, str) else stacks,
        "remainder": remainder,
        "lora_scale": lora_scale,
    }
    found = plan(space, model, budget, **planned)
    outside = _outside(model, found, dense)
    _check_attachable(found, model, lora_dropout)
    chosen = choose_entries(found, model, data, method, seed=seed, progress=progress, **options)
    before = {id(parameter): name for name, parameter in model.named_parameters()}
    attach(found, model, lora_dropout=lora_dropout, seed=seed)
    info = {"method": "design space", "selection": method, "seed": seed, "plan": planned}
    mask = _mask(found, model, chosen, before, outside, info)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in mask or name in mask.dense)
    return Applied(found, mask, outside)


def attach(found: Plan, model: Any, *, lora_dropout: float = 0.0, seed: int = 0) -> None:
    """Attach LoRA, prefixes and adapters of a plan to a model, in place: what a saved delta needs to be loaded.

    Raises:
        RuntimeError: peft is missing, or attached something else than was planned.
        TypeError: what is to be attached is no plan, the model none, or lora_dropout no number.
        ValueError: the model is not the plan's, cannot take what it has, or has been adapted before; lora_dropout is
            out of range.
    """
    check_model(model)
    _check_fresh(model)
    _check_planned(found, model)
    _check_attachable(found, model, lora_dropout)
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    before = sum(parameter.numel() for parameter in model.parameters())
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for part in found.parts("A"):
            for name in part.names:
                attach_adapter(model.get_submodule(name), model.config.hidden_size, part.size)
        for part in found.parts("P"):
            for name in part.names:
                prefix.attach(model, part.size, (name,), *heads_of(model.get_submodule(name)))
        _attach_lora(found, model, lora_dropout)
    added = sum(parameter.numel() for parameter in model.parameters()) - before
    planned = sum(part.weights for letter in "ALP" for part in found.parts(letter))
    if added != planned:
        raise RuntimeError(
            f"{added:,} weights were attached to {type(model).__name__} where {planned:,} were planned: peft treats "
            "this model in a way of its own; leave L out of the space, and load the model anew"
        )


def _attach_lora(found: Plan, model: Any, dropout: float) -> None:
    ranks = {re.escape(name): part.size for part in found.parts("L") for name in part.names}
    if not ranks:
        return
    from peft import LoraConfig, inject_adapter_in_model

    kinds = {type(model.get_submodule(name)).__name__ for part in found.parts("L") for name in part.names}
    config = LoraConfig(
        # whole names, not one pattern: peft reads the parts of a pattern by their last names in some models
        target_modules=[name for part in found.parts("L") for name in part.names],
        rank_pattern=ranks,
        alpha_pattern={name: found.lora_scale * rank for name, rank in ranks.items()},
        lora_dropout=dropout,
        fan_in_fan_out=kinds == {"Conv1D"},
    )
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    inject_adapter_in_model(config, model)
    # peft freezes all others, and what trains is not decided here
    model.requires_grad_(True)
    for parameter in frozen:
        parameter.requires_grad_(False)


def _mask(
    found: Plan, model: nn.Module, chosen: dict[str, Tensor], before: dict[int, str], outside: Sequence[str], info: Any
) -> Mask:
    """Return what trains, by the names that parameters have now: peft renames those of layers with LoRA."""
    biases = {name for part in found.parts("B") for name in part.names}
    indices, shapes, dense = {}, {}, {}
    for name, parameter in model.named_parameters():
        old = before.get(id(parameter))
        if old is None or old in biases or old in outside:
            dense[name] = parameter.shape
        else:
            shapes[name] = parameter.shape
            if old in chosen:
                indices[name] = chosen[old]
    info = {**info, "space": found.space.plain(), "budget": found.budget, "versions": versions()}
    base = fingerprint(model, shapes)
    mask = Mask(indices, shapes, dense=dense, aliases=aliases(model), info=info, fingerprint=base)
    return with_rest(mask, model)


def _outside(model: nn.Module, found: Plan, dense: str | Iterable[str] | None) -> tuple[str, ...]:
    names = match_names(dense, [name for name, _ in model.named_parameters()], "dense")
    layers = [layer for group in found.groups for layer in group.layers]
    inside = [name for name in names if any(layer.owns(name) for layer in layers)]
    if inside:
        raise ValueError(
            f"dense parameters are outside the budget and must be outside the layers too, got {inside[:4]}; the "
            "strategies say what trains in the layers"
        )
    return tuple(names)


def _default_targets(space: Space, model: Any) -> Sequence[str]:
    used = {letter for number in space.tunable for letter in space.strategies[number - 1]}
    if "L" not in used:
        return ()
    _check_peft()
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    kind = getattr(getattr(model, "config", None), "model_type", None)
    targets = KNOWN.get(kind)
    if not isinstance(targets, list):
        raise ValueError(f"peft has no list of layers for LoRA in models of type {kind!r}; name them by lora_targets=")
    return targets


def _check_planned(found: object, model: nn.Module) -> None:
    if not isinstance(found, Plan):
        raise TypeError(f"attach takes a Plan, got {type(found).__name__}; plan makes one, apply_space too")
    there = {name for name, _ in model.named_modules()}
    missing = [name for letter in "ALP" for part in found.parts(letter) for name in part.names if name not in there]
    if missing:
        raise ValueError(
            f"the plan is of another model: {missing[0]} and {len(missing) - 1} more of its modules are not in this "
            f"{type(model).__name__}; load the base that it was made for"
        )


def _check_attachable(found: Plan, model: Any, lora_dropout: float) -> None:
    check_number("lora_dropout", lora_dropout)
    if not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_dropout must lie in [0, 1), got {lora_dropout}")
    if found.parts("L") or found.parts("P"):
        _check_peft()
    attentions = [name for part in found.parts("P") for name in part.names]
    if attentions:
        prefix.check(model, attentions)


def _check_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            "LoRA and prefixes need peft, which is not installed; pip install 'sparseft[peft]'"
        ) from error


def _check_fresh(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, BottleneckAdapter) or type(module).__module__.startswith("peft."):
            raise ValueError(
                f"the model has been adapted before: {name or 'it'} is a {type(module).__name__}; load it anew, and "
                "apply one space"
            )
