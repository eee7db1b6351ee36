"""Lottery-ticket sparse fine-tuning: train everything, keep what changed most, begin again with that alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.mask import Mask
from sparseft.optim.base import SparseOptimizer
from sparseft.schedules.base import Schedule
from sparseft.schedules.masks import ranked, whole_mask
from sparseft.schedules.states import check_parts, mask_from_state, mask_state, shapes
from sparseft.selection.arguments import check_whole
from sparseft.selection.scopes import Scope, check_groups
from sparseft.selection.top_k import check_share, count_at


class LTSFT(Schedule):
    """LT-SFT: everything trains for some steps; then those entries are chosen that changed most, and all are rewound.

    From there on the chosen entries train alone, from the pretrained values and with an optimizer that knows nothing:
    its states are dropped. A learning rate scheduler is to be begun anew by who has one, when the mask changes.
    Parameters that may not be chosen (a new head) train whole in both phases, and are rewound too. Buffers are not.

    With several rounds each one chooses its share of the entries, among those that are not chosen yet: everything
    trains again for `steps` from where the round before ended, is rewound to there, and all that is chosen by then
    trains for `sparse_steps`, in the last round for as long as the run goes on.

    `mask` and `sparseft.save_delta` then give a delta of the pretrained model. Until the last choice, the values that
    all that trains is rewound to are kept.

    Args:
        model: the pretrained model.
        optimizer: of this package, made from whole parameters: `SparseAdamW(model.parameters(), ...)`.
        density: share of the entries that is chosen, in (0, 1], by all rounds together.
        steps: optimizer steps in which everything trains, in each round.
        rounds: how many.
        sparse_steps: optimizer steps in which the chosen entries train before another round begins.
        include: patterns of the parameters to choose from; by default all that the optimizer trains.
        dense: patterns of parameters that always train whole.
        scope: among which entries changes are ranked, as `top_k` has it; all together, as in the paper. Several rounds
            have no other.

    Raises:
        TypeError: a number of steps or rounds is not whole.
        ValueError: a phase would have no steps, a round no entry to choose, the density or scope is out of range, a
            pattern matches nothing, or the optimizer does not train whole parameters of the model.

    Source: arXiv 2110.07560. In the published code ties choose more than asked for, rounds choose equal numbers, so
    that what is left over is not chosen, and weight decay moves what does not train.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: SparseOptimizer,
        density: float,
        steps: int,
        *,
        rounds: int = 1,
        sparse_steps: int | None = None,
        include: str | Iterable[str] | None = None,
        dense: str | Iterable[str] | None = (),
        scope: Scope = "global",
    ) -> None:
        check_share(density)
        check_groups(scope, None, None, None, counted=True)
        _check_rounds(rounds, steps, sparse_steps, scope)
        self.density, self.rounds, self.scope = density, rounds, scope
        self.full_steps, self.sparse_steps = steps, sparse_steps
        self._whole = whole_mask(model, optimizer, include, dense)
        self._k = count_at(density, self._whole.n)
        if self._k < rounds:
            raise ValueError(
                f"each round must have an entry to choose, got {rounds} rounds for {self._k} of {self._whole.n:,} "
                "entries; have fewer rounds, or a larger density"
            )
        super().__init__(model, optimizer, self._whole)
        self._chosen: Mask | None = None
        self._start = self._weights_now()

    @property
    def round(self) -> int:
        """The round that the next step is of, from 0 on."""
        return self._place(self.steps)[0]

    @property
    def chosen(self) -> bool:
        """Whether the next step is one of chosen entries alone."""
        return self._place(self.steps)[1] >= self.full_steps

    def state_dict(self) -> dict[str, Any]:
        """Return what the schedule knows; until the last choice, the weights to rewind to are part of it."""
        chosen = None if self._chosen is None else mask_state(self._chosen)
        return {**super().state_dict(), "start": self._start, "chosen": chosen}

    def _check_state(self, state: dict[str, Any], mask: Mask) -> None:
        its_round, steps = self._place(state["steps"])
        check_parts("start", state["start"], {} if steps >= self.full_steps else shapes(self._weights()))
        if its_round == 0 and steps < self.full_steps:
            check_parts("chosen", state["chosen"], None)
        else:
            mask_from_state(state["chosen"], self._whole)

    def _load(self, state: dict[str, Any]) -> None:
        weights = self._weights()
        self._start = {name: saved.to(weights[name], copy=True) for name, saved in state["start"].items()}
        self._chosen = None if state["chosen"] is None else mask_from_state(state["chosen"], self._whole)
        self._whole.fingerprint = self.mask.fingerprint

    def _awaited(self) -> tuple[int, str] | None:
        return self.steps - self._place(self.steps)[1] + self.full_steps, "steps="

    def _options(self) -> dict[str, Any]:
        return {
            "density": self.density,
            "steps": self.full_steps,
            "rounds": self.rounds,
            "sparse_steps": self.sparse_steps,
            "scope": self.scope,
        }

    def _place(self, steps: int) -> tuple[int, int]:
        """Return which round comes after a number of steps, and how many of them were its own."""
        of_round = self.full_steps + (self.sparse_steps or 0)
        its_round = min(steps // of_round, self.rounds - 1)
        return its_round, steps - its_round * of_round

    def _weights(self) -> dict[str, Tensor]:
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name].detach() for name in (*self._whole.shapes, *self._whole.dense)}

    def _weights_now(self) -> dict[str, Tensor]:
        return {name: weight.clone() for name, weight in self._weights().items()}

    @torch.no_grad()
    def _after_step(self) -> None:
        _, place = self._place(self.steps)
        if place == self.full_steps:
            self._rewind(self._choose())
        elif place == 0:
            self._train(self._whole)
            self._start = self._weights_now()

    def _train(self, mask: Mask) -> None:
        """Train the entries of a mask, with an optimizer that knows nothing."""
        self._set_mask(mask)
        self.optimizer.state.clear()

    def _rewind(self, mask: Mask) -> None:
        """Have what was chosen train from where the round began."""
        self._train(mask)
        self._chosen = mask
        for name, weight in self._weights().items():
            weight.copy_(self._start[name])
        self._start = {}

    def _choose(self) -> Mask:
        weights = self._weights()
        changes = {name: (weights[name].float() - self._start[name].float()).abs_() for name in self._whole.shapes}
        for name, index in (self._chosen or {}).items():
            changes[name].view(-1)[index.to(changes[name].device).long()] = torch.finfo(torch.float32).max
        info = {"method": "LTSFT", "density_asked": self.density, "scope": self.scope, "step": self.steps}
        k = self._k * (self.round + 1) // self.rounds
        return ranked(changes, self._whole, self.model, k=k, scope=self.scope, info=info)


def _check_rounds(rounds: int, steps: int, sparse_steps: int | None, scope: Scope) -> None:
    """Raise unless every phase has steps, and every round a way to choose."""
    for name, value in (("steps", steps), ("rounds", rounds)):
        check_whole(name, value)
    if sparse_steps is not None:
        check_whole("sparse_steps", sparse_steps)
    if steps < 1:
        raise ValueError(f"everything must train for at least one step before the choice, got {steps}")
    if rounds < 1:
        raise ValueError(f"there must be at least one round, got {rounds}")
    if (rounds > 1) != (sparse_steps is not None):
        raise ValueError(
            "sparse_steps are those between two rounds: give them for several rounds and for no single one, got "
            f"{sparse_steps} for {rounds}"
        )
    if sparse_steps is not None and sparse_steps < 1:
        raise ValueError(f"chosen entries must train for at least one step in each round, got {sparse_steps}")
    if rounds > 1 and scope != "global":
        raise ValueError(
            f"several rounds rank all entries together, got the scope {scope!r}; have one round, or leave scope out"
        )
