"""Dynamic parameter selection: train everything and score it, train the best entries alone, and again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.mask import OTHERS_TRAINED, Mask
from sparseft.optim.base import SparseOptimizer
from sparseft.optim.left_out import LeftOut, left_out_states, return_states
from sparseft.schedules.base import Schedule
from sparseft.schedules.masks import linear_weights, ranked, whole_mask
from sparseft.schedules.states import check_left_out, check_parts
from sparseft.selection.arguments import check_number, check_whole
from sparseft.selection.scopes import Scope, check_groups
from sparseft.selection.top_k import check_share


class DPS(Schedule):
    """DPS Dense: cycles of two stages, counted in optimizer steps.

    In stage one every entry trains, and the squares of the gradients that the optimizer finds are summed: without
    GradScaler's scale, after accumulation, averaging and `clip_grad_norm_`, before `max_norm`. Then the entries with
    the largest sums are chosen, and in stage two they train alone. What may not be chosen (biases, norms, embeddings,
    a new head) always trains. Nothing else of a chosen tensor moves in stage two: no momentum, no decay.

    The optimizer is to train whole parameters. States of the entries that stage two leaves out are kept here and come
    back in stage one: begun anew, AdamW's first steps would be three times too large. In stage one a score an entry is
    kept, in stage two those states; together with the optimizer's that is never more than one score an entry beyond
    dense training, and two bytes for the index lists.

    All weights change in the course of this, so the result is a whole model, and no delta.

    Args:
        model: the pretrained model, as it is going to be trained: in training mode, dropout as the paper has it at 0.
        optimizer: of this package, made from whole parameters: `SparseAdamW(model.parameters(), ...)`.
        density: how much trains in stage two, in (0, 1]. The paper freezes 30 %.
        stage_steps: optimizer steps of a stage, or of each of the two.
        total_steps: in its place, the steps of the whole run: a stage then takes `update_ratio` of them.
        update_ratio: see there, at most 0.5; the paper has 0.05.
        include: patterns of the parameters to choose from; by default the weights of linear layers.
        dense: patterns of parameters that always train whole, a new head for instance.
        scope: among which entries scores are ranked, as `top_k` has it; those of each tensor, as in the paper.

    Raises:
        TypeError: a number of steps is not whole.
        ValueError: a stage would have no steps, the density is out of range, a pattern matches nothing, or the
            optimizer does not train whole parameters of the model.

    Source: arXiv 2211.01642. In the published code momentum and decay move what stage two freezes, forward passes are
    counted in place of steps, one overflow empties the mask, ties select too much, resuming starts over, and the
    classifier is chosen from like any layer, as it is here unless it is named by dense.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: SparseOptimizer,
        density: float = 0.7,
        *,
        stage_steps: int | tuple[int, int] | None = None,
        total_steps: int | None = None,
        update_ratio: float = 0.05,
        include: str | Iterable[str] | None = None,
        dense: str | Iterable[str] | None = (),
        scope: Scope = "tensor",
    ) -> None:
        check_share(density)
        check_groups(scope, None, None, None, counted=True)
        self.stage_steps = _stages(stage_steps, total_steps, update_ratio)
        self.density, self.scope = density, scope
        self._whole = whole_mask(model, optimizer, include, dense, linear_weights(model))
        super().__init__(model, optimizer, self._whole)
        self._scores = self._no_scores()
        self._left_out: LeftOut = {}

    @property
    def stage(self) -> int:
        """The stage that the next step is of: 1 or 2."""
        return self._stage_at(self.steps)

    def state_dict(self) -> dict[str, Any]:
        """Return what the schedule knows: where it is, scores, and the states that are kept for stage one."""
        return {**super().state_dict(), "scores": self._scores, "left_out": self._left_out}

    def _check_state(self, state: dict[str, Any], mask: Mask) -> None:
        in_stage_one = self._stage_at(state["steps"]) == 1
        scored = {name: mask.shapes[name] for name in self._whole}
        check_parts("scores", state["scores"], scored if in_stage_one else {})
        check_left_out(state["left_out"], mask, self.optimizer, self.model)

    def _load(self, state: dict[str, Any]) -> None:
        parameters = dict(self.model.named_parameters())
        self._scores = {name: kept.to(parameters[name].device, copy=True) for name, kept in state["scores"].items()}
        self._left_out = {
            name: (left.to(parameters[name].device, copy=True), _copied(kept, parameters[name].device))
            for name, (left, kept) in state["left_out"].items()
        }

    def _awaited(self) -> tuple[int, str] | None:
        return self.stage_steps[0], "stage_steps= or total_steps="

    def _stage_at(self, steps: int) -> int:
        return 1 if steps % sum(self.stage_steps) < self.stage_steps[0] else 2

    def _options(self) -> dict[str, Any]:
        return {"density": self.density, "stage_steps": list(self.stage_steps), "scope": self.scope}

    def _after_step(self) -> None:
        place = (self.steps - 1) % sum(self.stage_steps)
        if place < self.stage_steps[0]:
            self._add_squares()
        if place + 1 == self.stage_steps[0]:
            self._freeze(self._choose())
        elif place + 1 == sum(self.stage_steps):
            self._set_mask(self._whole)
            return_states(self.optimizer, self._left_out, self.model)
            self._left_out, self._scores = {}, self._no_scores()

    def _no_scores(self) -> dict[str, Tensor]:
        parameters = dict(self.model.named_parameters())
        return {name: torch.zeros_like(parameters[name], dtype=torch.float32) for name in self._whole}

    @torch.no_grad()
    def _add_squares(self) -> None:
        scale = getattr(self.optimizer, "grad_scale", None)
        factor = 1.0 if scale is None else float(scale) ** -2
        parameters = dict(self.model.named_parameters())
        for name, score in self._scores.items():
            if (grad := parameters[name].grad) is not None:
                score.addcmul_(grad.float(), grad.float(), value=factor)

    def _choose(self) -> Mask:
        return self._ranked(self._scores)

    def _ranked(self, scores: dict[str, Tensor]) -> Mask:
        info = {
            "method": type(self).__name__,
            "density_asked": self.density,
            "scope": self.scope,
            "step": self.steps,
            OTHERS_TRAINED: True,
        }
        return ranked(scores, self._whole, self.model, density=self.density, scope=self.scope, info=info)

    def _freeze(self, mask: Mask) -> None:
        self._left_out = left_out_states(self.optimizer, mask, self.model)
        self._set_mask(mask)
        self._scores = {}


def _stages(
    stage_steps: int | tuple[int, int] | None, total_steps: int | None, update_ratio: float
) -> tuple[int, int]:
    """Return how many steps each stage has.

    Raises:
        TypeError: a number of steps is not whole, or update_ratio is none.
        ValueError: a stage has none.
    """
    if (stage_steps is None) == (total_steps is None):
        raise ValueError(f"give either stage_steps or total_steps, got {stage_steps} and {total_steps}")
    if total_steps is not None:
        check_whole("total_steps", total_steps)
        check_number("update_ratio", update_ratio)
        if not update_ratio <= 0.5:
            raise ValueError(
                f"update_ratio must be at most 0.5, so that a run of total_steps has both stages, got {update_ratio}"
            )
        stage_steps = int(total_steps * update_ratio)
        if stage_steps < 1:
            raise ValueError(
                f"a stage has update_ratio of total_steps, at least one step, got {update_ratio} of {total_steps}; "
                "for a run counted in epochs give its number of optimizer steps, for a short one a larger update_ratio"
            )
    steps: tuple[Any, ...] = (
        tuple(stage_steps) if isinstance(stage_steps, (tuple, list)) else (stage_steps, stage_steps)
    )
    if len(steps) != 2:
        raise ValueError(f"stage_steps must be one number of steps, or one for each of the two stages, got {steps}")
    for each in steps:
        check_whole("stage_steps", each)
    first, second = steps
    if min(first, second) < 1:
        raise ValueError(f"each stage must have at least one step, got {first} and {second}")
    return first, second


def _copied(state: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device, copy=True) for name, value in state.items()}
