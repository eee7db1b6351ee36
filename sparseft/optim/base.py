"""What makes a sparse optimizer a torch optimizer. Written once: a new optimizer adds only its update."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from sparseft import ops  # noqa: F401  (registers torch.ops.sparseft)
from sparseft.entries import is_leaf
from sparseft.mask import Mask
from sparseft.optim.clipping import divisor, gradient_norm
from sparseft.optim.mask_change import Move, carry_leaf, members
from sparseft.optim.options import DEFAULTS, SharedOptions, check_options
from sparseft.optim.parameters import (
    Trained,
    checked_indices,
    entries,
    take_master,
    trained,
    unpacked,
    untie_copies,
    weight,
)
from sparseft.optim.states import carried_state, make_state


@dataclasses.dataclass
class Step:
    """One step of one group: lists in the order of its parameters, and the options that every optimizer's op takes."""

    params: list[Tensor]
    grads: list[Tensor]
    indices: list[Tensor]
    masters: list[Tensor]
    states: list[dict[str, Any]]
    options: dict[str, Any]

    def state(self, name: str) -> list[Tensor]:
        """Return the state of that name of every parameter."""
        return [state[name] for state in self.states]


class SparseOptimizer(torch.optim.Optimizer):
    """Base of the optimizers that train selected entries only.

    A parameter group may hold `indices`: one index list a parameter, positions or packed (`sparseft.index_lists`), as
    `Mask.param_groups` makes them. A group without it trains every entry. Nothing outside the index lists changes, bit
    for bit: no decay, no momentum. `param.grad` is read and never written; a gradient of k entries in place of a dense
    one works too.

    State has one entry a selected weight, in fp32: torch's names, `step` (0-d), and for a bf16 or fp16 parameter
    `master`, its selected entries in fp32. What every optimizer can be asked for, `SharedOptions`, may change that.
    In place of parameters, a group may hold the leaves that `compact_gradients` makes of their selected entries.
    """

    # GradScaler hands its scale and overflow flag to step, which then needs no host synchronisation
    _step_supports_amp_scaling = True
    # the names of the k-sized states that the rule may keep: at most two, the second a mean of squares
    states: tuple[str, ...] = ()
    # compact_gradients has weights follow their leaves after a step, which ours do in the step
    updates_dense = True

    def __init__(self, params: ParamsT, defaults: dict[str, Any], options: SharedOptions) -> None:
        unknown = sorted(set(options) - set(DEFAULTS))
        if unknown:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(unknown)}; it has {', '.join(DEFAULTS)}")
        super().__init__(params, {**defaults, **DEFAULTS, **options})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            # of a state that was saved before an option was there
            for option, value in DEFAULTS.items():
                group.setdefault(option, value)
            untie_copies(group, self.state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; `indices` is one list a parameter, or None to train every entry.

        Raises:
            TypeError: a parameter or an index list has a dtype that is not served.
            ValueError: an option is out of range, index lists and parameters differ in number, or a list is unsorted,
                repeats or leaves its parameter.
        """
        indices = param_group.get("indices")
        params = param_group["params"]
        if isinstance(params, list) and any(isinstance(param, str) for param in params):
            raise TypeError("params must be tensors or groups, got names; for a mask give mask.param_groups(model)")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_options(group)
            group["indices"] = checked_indices(group["params"], indices)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        # as what compact_gradients leaves out is, among a model's parameters
        self._frozen = {*getattr(self, "_frozen", ()), *(id(p) for p in group["params"] if not p.requires_grad)}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the selected entries of every parameter that has a gradient.

        Args:
            closure: recomputes the loss, with gradients enabled; its result is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = self.trained()
        norm = None
        if any(group["max_norm"] is not None for group in self.param_groups):
            norm = gradient_norm((found.grads, found.indices, found.k) for found in work)
        place = 0
        for group, found in zip(self.param_groups, work, strict=True):
            if found.params:
                self._group_step(group, found, place, norm)
            place += len(group["params"])
        return loss

    def trained(self) -> list[Trained]:
        """Return what a step of each group works on now."""
        return [trained(group, getattr(self, "_frozen", ())) for group in self.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the state; the leaf of a bf16 or fp16 parameter is in it as the `master` that it doubles as."""
        found = super().state_dict()
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        keys = chain.from_iterable(group["params"] for group in found["param_groups"])
        for key, param in zip(keys, params, strict=True):
            if key in found["state"] and is_leaf(param) and param.is_master:
                found["state"][key] = {**found["state"][key], "master": param.detach()}
        return found

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, index lists included; dtypes and values stay as they were saved.

        Raises:
            ValueError: groups, parameters or index lists do not fit, or it is of another optimizer; nothing was
                changed.
        """
        saved_groups = state_dict["param_groups"]
        saved, own = ([len(group["params"]) for group in groups] for groups in (saved_groups, self.param_groups))
        if saved != own:
            raise ValueError(
                f"the state must be of groups of {own} parameters, got {saved}; it was saved with another mask or "
                "another model: build the optimizer from that mask, and load the state of a schedule before this one"
            )
        self._check_kind(state_dict)
        indices = [
            checked_indices(group["params"], saved["indices"])
            for group, saved in zip(self.param_groups, saved_groups, strict=True)
        ]
        super().load_state_dict(state_dict)
        for group, lists in zip(self.param_groups, indices, strict=True):
            group["indices"] = lists
        # torch rounds every state tensor but `step` to the parameter's dtype, which ruins the fp32 moments of a bf16
        # model. It did groups and hooks; the saved tensors go back in their own dtype.
        keys = chain.from_iterable(group["params"] for group in saved_groups)
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, param in zip(keys, params, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                self.state[param][name] = value.to(param.device, copy=True) if torch.is_tensor(value) else value
            if is_leaf(param) and param.is_master and "master" in self.state[param]:
                take_master(param, self.state[param].pop("master"))

    @torch.no_grad()
    def set_mask(self, mask: Mask, model: nn.Module) -> None:
        """Train the entries of another mask from the next step on: for schedules that choose anew while training.

        Entries that stay keep their state. New ones start with moments of zero, and a parameter's step count goes on:
        their first AdamW steps are up to (1 - beta1) / sqrt(1 - beta2) times lr, 3.2 by default. What is no longer
        selected keeps its weight and loses its state. Call it between a step and the next backward pass.

        Parameters stay in their groups. New ones join the group named `selected` or `dense`, as the mask has them, or
        the first. One with nothing selected leaves, and comes back to its group, without a state. Parameters that are
        not the mask's, because it was selected without them, stay as they are.

        Raises:
            ValueError: the mask is of another model, or none of its parameters is in the optimizer; nothing changes.
        """
        groups = members(self.param_groups, getattr(self, "_homes", {}), mask, model)
        lists = [checked_indices([m.param for m in group], [m.indices for m in group]) for group in groups]
        states: dict[Tensor, dict[str, Any]] = {}
        for group, its_members, its_lists in zip(self.param_groups, groups, lists, strict=True):
            old_lists = {id(param): index for param, index in zip(group["params"], group["indices"], strict=True)}
            for member, index in zip(its_members, its_lists, strict=True):
                if member.before is not None and member.before in self.state:
                    move = Move.between(
                        *(unpacked(member.before, each) for each in (old_lists[id(member.before)], index))
                    )
                    carry_leaf(member.before, member.param, move)
                    state, names = self.state[member.before], self._state_names(group)
                    states[member.param] = carried_state(state, names, member.param, index, move)
        held = {weight(param): place for place, group in enumerate(self.param_groups) for param in group["params"]}
        self._homes = {**getattr(self, "_homes", {}), **held}
        for group, its_members, its_lists in zip(self.param_groups, groups, lists, strict=True):
            group["params"], group["indices"] = [member.param for member in its_members], its_lists
            if "param_names" in group:
                group["param_names"] = [member.name for member in its_members]
        self.state.clear()
        self.state.update(states)

    def __repr__(self) -> str:
        pairs = (pair for group in self.param_groups for pair in zip(group["params"], group["indices"], strict=True))
        k = sum(entries(*pair) for pair in pairs)
        options = {
            key: value for key, value in self.param_groups[0].items() if key not in ("params", "indices", "name")
        }
        return f"{type(self).__name__}({k:,} entries, {options})"

    def _group_step(self, group: dict[str, Any], found: Trained, first_place: int, norm: Tensor | None) -> None:
        """Call the optimizer's op with what every optimizer shares; `first_place`: parameters in groups before."""
        params, device = found.params, found.params[0].device
        states = [self.state[param] for param in params]
        names = self._state_names(group)
        for state, param, index in zip(states, params, found.indices, strict=True):
            make_state(state, group, names, param, index)
        lr, grad_scale = group["lr"], getattr(self, "grad_scale", None)
        if norm is not None and group["max_norm"] is not None:
            grad_scale = divisor(norm, group["max_norm"], grad_scale).to(device, non_blocking=True)
        # a tensor on the device stays there, so that a captured graph follows the schedule
        on_device = torch.is_tensor(lr) and lr.device.type != "cpu"
        shared = {
            "lr": 0.0 if on_device else float(lr),
            "lr_tensor": lr if on_device else None,
            "weight_decay": group["weight_decay"],
            "maximize": group["maximize"],
            "pretrained": [state["pretrained"] for state in states] if group["decay_to"] == "pretrained" else None,
            "seeds": None,
            "scales": None,
            "grad_scale": grad_scale,
            "found_inf": getattr(self, "found_inf", None),
        }
        if group["state_bits"] == 8 and names:
            shared["scales"] = [state["scales"] for state in states]
        if group["rounding"] == "stochastic" or shared["scales"]:
            shared["seeds"] = [group["seed"] + first_place + place for place in found.places]
        leaves = [param for param in params if is_leaf(param)]
        weights = params
        if leaves:
            with torch._C.DisableTorchFunctionSubclass():
                weights = [weight(param).detach() for param in params]
        masters = _masters(group, params, states)
        self._update(group, Step(weights, found.grads, found.indices, masters, states, shared))
        torch.autograd.graph.increment_version([*params, *(leaf.dense for leaf in leaves)])
        for leaf in leaves:
            leaf.mark_written()  # the op wrote both it and its weights

    def _check_kind(self, state_dict: dict[str, Any]) -> None:
        """Raise if a state has not what an optimizer of this kind saves."""
        groups = state_dict["param_groups"]
        # torch adds "differentiable" to the defaults of an optimizer that loaded a state
        needed = {"indices", *self.defaults} - {*DEFAULTS, "differentiable"}
        missing = {option for group in groups for option in needed - set(group)}
        found = {name for state in state_dict["state"].values() for name in state}
        foreign = found - {"step", "master", "pretrained", "scales", *self.states}
        if missing or foreign:
            raise ValueError(
                f"the state must be of a {type(self).__name__}, got one with {sorted(found)} and without the options "
                f"{sorted(missing)}; load it into the optimizer that it is of"
            )

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of the k-sized states that a group's options need."""
        return self.states

    def _update(self, group: dict[str, Any], step: Step) -> None:
        """Call the optimizer's op: the only method that a new optimizer writes."""
        raise NotImplementedError


def _masters(group: Mapping[str, Any], params: list[Tensor], states: list[dict[str, Any]]) -> list[Tensor]:
    """Return the fp32 copies of the parameters' selected entries, empty tensors where there are none."""
    none, kept = _no_master(params[0].device), group["rounding"] == "master"
    return [
        param if is_leaf(param) and param.has_values else state.get("master", none) if kept else none
        for param, state in zip(params, states, strict=True)
    ]


@functools.cache
def _no_master(device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.float32, device=device)
