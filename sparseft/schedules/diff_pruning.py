"""Diff pruning: gates in front of all differences learn which ones are needed, then the largest train alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.mask import Mask
from sparseft.optim.base import SparseOptimizer
from sparseft.schedules.base import Schedule
from sparseft.schedules.gates import Gates, HardConcrete, shapes_of_gates
from sparseft.schedules.masks import ranked, whole_mask
from sparseft.schedules.states import check_parts
from sparseft.schedules.substitution import Substitution
from sparseft.selection.arguments import check_number, check_whole
from sparseft.selection.scopes import Scope, check_groups
from sparseft.selection.top_k import check_share


class DiffPruning(Schedule):
    """Diff pruning: in phase one modules compute with W0 + z (W - W0), in phase two the largest differences train.

    z are random gates of the hard-concrete distribution, another draw each step, the same for all its forward passes.
    Their log-alphas learn beside the weights, by an Adam of their own, from the loss and from a penalty: `penalty`
    times the expected number of entries whose gate is not 0. In evaluation mode gates are those of u = 1 / 2, undrawn.

    After `steps` optimizer steps those entries are chosen whose differences are the largest, gates included, exactly
    floor(density * n). These keep their gated differences, all others get back their pretrained values, gates are
    dropped, and so are the optimizer's states: from there on the chosen entries train like those of any mask. A
    learning rate scheduler is to be begun anew by who has one. `mask` and `sparseft.save_delta` give a delta.

    The gradient of a gate follows from that of its weight, which is what DDP, accumulation, GradScaler and
    `clip_grad_norm_` made of it, so gates need no care of their own. Beyond dense training, phase one keeps the
    pretrained value, the log-alpha and its two moments of every entry, its gradient during a step, and from forward to
    backward pass the gate and the gated weight.

    Weight decay pulls weights to zero, and would make differences: let the optimizer have none, or
    `decay_to="pretrained"`.

    Args:
        model: the pretrained model. In phase one it is to train in training mode.
        optimizer: of this package, made from whole parameters: `SparseAdamW(model.parameters(), ...)`.
        density: share of the entries that is chosen, in (0, 1].
        steps: optimizer steps of phase one.
        penalty: what an entry that differs costs, in units of the loss.
        structured: whether each tensor has a gate too, which multiplies those of its entries.
        gate_lr: learning rate of the log-alphas.
        log_alpha: what they begin with; at 5 and the stretch given, a gate is 1 with probability 0.97.
        stretch: between which numbers gates lie before they are cut to [0, 1].
        include: patterns of the parameters that have gates; by default all that the optimizer trains.
        dense: patterns of parameters that train whole in both phases: a new head, as a rule.
        scope: among which entries differences are ranked, as `top_k` has it; all together, as in the paper.
        seed: of the draws.

    Raises:
        TypeError: steps or seed is not a whole number, or another option not a number.
        ValueError: an option is out of range, a pattern matches nothing, or the optimizer does not train whole
            parameters of the model.

    Source: arXiv 2012.07463. The published code seeds the draws of every batch alike, so that all steps have the same
    one, and never zeroes the model's gradients; of accumulated batches the gates of the last one count; with gates of
    tensors it adds both penalties where the paper multiplies the probabilities; the head competes for the budget,
    which a threshold meets about; and phase two begins from differences without gates.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: SparseOptimizer,
        density: float,
        steps: int,
        *,
        penalty: float = 1.25e-7,
        structured: bool = False,
        gate_lr: float = 0.1,
        log_alpha: float = 5.0,
        stretch: tuple[float, float] = (-1.5, 1.5),
        include: str | Iterable[str] | None = None,
        dense: str | Iterable[str] | None = (),
        scope: Scope = "global",
        seed: int = 0,
    ) -> None:
        check_share(density)
        check_groups(scope, None, None, None, counted=True)
        check_whole("steps", steps)
        if steps < 1:
            raise ValueError(f"gates must learn for at least one step before the choice, got {steps}")
        for name, value in (("penalty", penalty), ("gate_lr", gate_lr), ("log_alpha", log_alpha)):
            check_number(name, value)
        check_whole("seed", seed)
        if penalty < 0 or gate_lr <= 0:
            raise ValueError(f"penalty must be at least 0 and gate_lr above it, got {penalty} and {gate_lr}")
        self.density, self.gate_steps, self.scope = density, steps, scope
        self._distribution = _stretched(stretch)
        self._gate_options: dict[str, Any] = {
            "log_alpha": log_alpha,
            "structured": structured,
            "penalty": penalty,
            "lr": gate_lr,
            "seed": seed,
        }
        super().__init__(model, optimizer, whole_mask(model, optimizer, include, dense))
        self._pretrained = {name: weight.clone() for name, weight in self._weights().items()}
        self._gates: Gates | None = self._new_gates()
        self._substitution = Substitution(model, self._pretrained, self._in_place_of)

    @property
    def chosen(self) -> bool:
        """Whether the entries that train were chosen already."""
        return self.steps >= self.gate_steps

    @property
    def expected_entries(self) -> float:
        """How many entries would differ, in the mean over draws; after the choice, how many may."""
        return float(self.mask.k) if self._gates is None else self._gates.expected()

    def state_dict(self) -> dict[str, Any]:
        """Return what the schedule knows; until the choice, pretrained weights and gates are part of it."""
        gates = None if self._gates is None else self._gates.state_dict()
        return {**super().state_dict(), "pretrained": self._pretrained, "gates": gates}

    def _check_state(self, state: dict[str, Any], mask: Mask) -> None:
        learning = state["steps"] < self.gate_steps
        check_parts("pretrained", state["pretrained"], mask.shapes if learning else {})
        structured, steps = self._gate_options["structured"], state["steps"]
        check_parts("gates", state["gates"], shapes_of_gates(mask.shapes, structured, steps) if learning else None)

    def _load(self, state: dict[str, Any]) -> None:
        weights = self._weights()
        self._pretrained = {name: saved.to(weights[name], copy=True) for name, saved in state["pretrained"].items()}
        self._gates = None
        if state["gates"] is not None:
            self._gates = self._new_gates()
            self._gates.load_state_dict(state["gates"])

    def _awaited(self) -> tuple[int, str] | None:
        return self.gate_steps, "steps="

    def _stop(self) -> None:
        super()._stop()
        self._substitution.close()

    def _options(self) -> dict[str, Any]:
        stretch = [self._distribution.low, self._distribution.high]
        return {
            "density": self.density,
            "steps": self.gate_steps,
            "scope": self.scope,
            "stretch": stretch,
            **self._gate_options,
        }

    def _new_gates(self) -> Gates:
        return Gates(self._pretrained, self._distribution, **self._gate_options)

    def _weights(self) -> dict[str, Tensor]:
        return {name: self.model.get_parameter(name).detach() for name in self.mask.shapes}

    def _in_place_of(self, name: str, weight: Tensor, training: bool) -> Tensor | None:
        if self._gates is None:
            return None
        gate = self._gates.drawn(name, self.steps).product() if training else self._gates.settled(name)
        return torch.lerp(self._pretrained[name], weight, gate.to(weight.dtype))

    @torch.no_grad()
    def _before_step(self) -> None:
        if self._gates is None:
            return
        scale = getattr(self.optimizer, "grad_scale", None)
        factor = 1.0 if scale is None else 1 / float(scale)
        past_gates = {}
        for name, pretrained in self._pretrained.items():
            weight, draw = self.model.get_parameter(name), self._gates.drawn(name, self.steps)
            by_gate = torch.zeros((), device=weight.device)
            if weight.grad is not None:
                # what the forward pass multiplied by
                gate, grad = draw.product().to(weight.dtype).float(), weight.grad.float()
                past_gates[name] = ((gate == 0) & (grad != 0)).any()
                by_gate = torch.where(gate > 0, grad * factor / gate, 0) * (weight.float() - pretrained.float())
            self._gates.take_gradient(name, draw, by_gate)
        past = [name for name, flag in zip(past_gates, _on_host(past_gates.values()), strict=True) if flag]
        if past:
            self._gates.forget_gradients()
            raise RuntimeError(
                f"gradients must come through the gates of this step, got some of {past[0]} where its gates are shut; "
                "zero gradients after each step, train in training mode, and leave parameters that are read outside "
                "of their module's forward pass out of include"
            )

    @torch.no_grad()
    def _after_step(self) -> None:
        if self._gates is None:
            return
        self._gates.step()
        if self.steps == self.gate_steps:
            self._project(self._choose(self._gates), self._gates)

    def _choose(self, gates: Gates) -> Mask:
        info = {"method": "DiffPruning", "density_asked": self.density, "scope": self.scope, "step": self.steps}
        differences = {
            name: (self._gated(name, gates).float() - pretrained.float()).abs_()
            for name, pretrained in self._pretrained.items()
        }
        if not any(bool(difference.any()) for difference in differences.values()):
            raise ValueError(
                f"after {self.steps} steps every difference or its gate is zero, which leaves nothing to choose; take "
                "a smaller penalty or gate_lr, a larger log_alpha, or check that the loss depends on the model"
            )
        return ranked(differences, self.mask, self.model, density=self.density, scope=self.scope, info=info)

    def _gated(self, name: str, gates: Gates) -> Tensor:
        """Return what evaluation computes with in place of a weight."""
        weight = self.model.get_parameter(name).detach()
        return torch.lerp(self._pretrained[name], weight, gates.settled(name).to(weight.dtype))

    def _project(self, mask: Mask, gates: Gates) -> None:
        """Go over to phase two."""
        self._set_mask(mask)
        self.optimizer.state.clear()
        for name, weight in self._weights().items():
            gated = self._gated(name, gates).view(-1)
            weight.copy_(self._pretrained[name])
            if name in mask:
                index = mask[name].to(weight.device).long()
                weight.view(-1)[index] = gated[index]
        self._gates, self._pretrained = None, {}


def _stretched(stretch: object) -> HardConcrete:
    if not isinstance(stretch, (tuple, list)) or len(stretch) != 2:
        raise TypeError(f"stretch must be two numbers, the lowest and the highest of a gate, got {stretch!r}")
    for end in stretch:
        check_number("stretch", end)
    return HardConcrete(*stretch)


def _on_host(flags: Iterable[Tensor]) -> list[bool]:
    """Return flags of several devices, with one wait for each of these."""
    flags = list(flags)
    found: list[bool] = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist() if flags else []
    return found
