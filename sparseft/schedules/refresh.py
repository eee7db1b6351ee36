"""Choosing anew every n steps."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparseft.mask import OTHERS_TRAINED, Mask, check_mask
from sparseft.optim.base import SparseOptimizer
from sparseft.schedules.base import Schedule
from sparseft.selection import checked_method, select
from sparseft.selection.arguments import check_whole
from sparseft.selection.scopes import check_groups
from sparseft.selection.top_k import check_density

if TYPE_CHECKING:
    from typing_extensions import Self


class Refresh(Schedule):
    """Chooses another mask after every n optimizer steps; entries that stay keep their optimizer state.

    Args:
        model: the model that trains.
        optimizer: of this package, made from `mask`.
        mask: what it begins with.
        every: optimizer steps between two choices.
        choose: takes the model as it is then, and returns the next mask, of the same parameters:
            `lambda model: sparseft.select("fish", model, loader, density=0.005)`. It is called with gradients enabled.

    Raises:
        TypeError: every is not a whole number, or choose cannot be called.
        ValueError: every is below 1, the optimizer trains other entries than the mask's, or parameters to choose from
            are frozen, as `mask.freeze_rest` leaves them.

    Source: FISH's masks of every epoch, arXiv 2111.09839; there, momentum goes on moving what is no longer selected.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: SparseOptimizer,
        mask: Mask,
        *,
        every: int,
        choose: Callable[[nn.Module], Mask],
    ) -> None:
        check_whole("every", every)
        if every < 1:
            raise ValueError(f"every must be at least 1 optimizer step, got {every}")
        if not callable(choose):
            raise TypeError(
                f"choose must be called with the model and return the next mask, got {choose!r}; a method by name is "
                "Refresh.by_method's"
            )
        self.every, self._choose = every, choose
        super().__init__(model, optimizer, mask)

    @classmethod
    def by_method(
        cls,
        model: nn.Module,
        optimizer: SparseOptimizer,
        mask: Mask,
        method: str,
        data: Iterable[Any] | None = None,
        *,
        every: int,
        seed: int = 0,
        **options: Any,
    ) -> Self:
        """Choose by a selection method, from the parameters that the mask is of.

        `Refresh.by_method(model, optimizer, mask, "fish", loader, every=len(loader))` are FISH's masks of every epoch.

        Args:
            model: as for the schedule.
            optimizer: as for the schedule.
            mask: as for the schedule.
            method: as `sparseft.select` has it.
            data: as `sparseft.select` has it, read anew for each choice; the same in all data-parallel processes.
            every: as for the schedule.
            seed: of what the method draws; the steps so far are added.
            options: others of `sparseft.select`, and those of the method. Without a density, k or per_group it chooses
                as many entries as the mask has.

        Raises:
            TypeError: the method has no such option.
            ValueError: there is no such method, it chooses by names alone, its data is missing or can be read but
                once, an option is out of range, or what the schedule raises.
        """
        check_mask(mask)
        if not options.keys() & {"density", "k", "per_group"}:
            options["k"] = mask.k
        _check_choice(model, method, data, seed, options)
        chosen = {"include": list(mask.shapes), "dense": list(mask.dense), **options}
        schedule = cls(
            model,
            optimizer,
            mask,
            every=every,
            choose=lambda model: select(method, model, data, seed=seed + schedule.steps, **chosen),
        )
        return schedule

    def _awaited(self) -> tuple[int, str] | None:
        return self.every, "every="

    def _options(self) -> dict[str, Any]:
        return {"every": self.every}

    def _check_trains(self, mask: Mask) -> None:
        super()._check_trains(mask)
        _check_not_frozen(self.model, mask)

    def _after_step(self) -> None:
        if self.steps % self.every == 0:
            _check_not_frozen(self.model, self.mask)
            with torch.enable_grad():
                mask = self._choose(self.model)
            if not isinstance(mask, Mask):
                raise TypeError(f"choose must return the next mask, got {type(mask).__name__}; have it return one")
            if (mask.shapes, mask.dense) != (self.mask.shapes, self.mask.dense):
                raise ValueError(
                    f"choose must return a mask of the same parameters as before, got one that selects from "
                    f"{len(mask.shapes)} in place of {len(self.mask.shapes)} and trains {len(mask.dense)} in place of "
                    f"{len(self.mask.dense)} whole, or others; select with the same include, exclude and dense, and "
                    "freeze nothing in between"
                )
            mask = copy.copy(mask)
            mask.info = {**mask.info, OTHERS_TRAINED: True}
            self._set_mask(mask)


def _check_not_frozen(model: nn.Module, mask: Mask) -> None:
    """Raise if a parameter that the next mask is chosen from does not train."""
    # unfreezing it here would be too late for DDP, which averages what had requires_grad when it wrapped the model
    frozen = [name for name, p in model.named_parameters() if name in mask.shapes and not p.requires_grad]
    if frozen:
        raise ValueError(
            f"Refresh chooses from all {len(mask.shapes)} parameters of the mask, got {len(frozen)} of them frozen, "
            f"{frozen[0]} the first; leave mask.freeze_rest(model) out, or unfreeze them before the model is wrapped"
        )


def _check_choice(
    model: nn.Module, method: str, data: Iterable[Any] | None, seed: int, options: dict[str, Any]
) -> None:
    """Raise unless a method can choose with these options, as often as it has to."""
    shared = inspect.signature(select).parameters
    of_method = {key: value for key, value in options.items() if key not in shared}
    found = checked_method(method, model, data, seed, of_method)
    if found.scope is None:
        raise ValueError(f"method {method!r} chooses by names alone, the same each time; there is nothing to refresh")
    if names := options.keys() & {"include", "exclude", "dense"}:
        raise ValueError(f"the parameters to choose from are the mask's, got {', '.join(sorted(names))}; leave it out")
    if data is not None and iter(data) is data:
        raise ValueError(
            f"data must be readable more than once, got {type(data).__name__}, which the first choice would use up; "
            "give a DataLoader or a list of batches"
        )
    density, k, per_group, structure = (options.get(key) for key in ("density", "k", "per_group", "structure"))
    if per_group is None:
        check_density(density, k)
    scope = options.get("scope") or (found.scope if structure is None else "tensor")
    check_groups(scope, structure, options.get("block"), per_group, counted=density is not None or k is not None)
