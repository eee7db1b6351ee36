"""Gates: random numbers that are often exactly 0 or 1, one an entry, which learn how often.

Source: the hard-concrete distribution and its expected L0 norm, arXiv 1712.01312; at temperature 1 and over weights of
a difference, as diff pruning has it, arXiv 2012.07463.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseft.schedules.draws import generator_at


@dataclasses.dataclass(frozen=True)
class HardConcrete:
    """The distribution of a gate: min(1, max(0, low + (high - low) sigmoid(log u - log(1 - u) + log_alpha))).

    u is uniform in (0, 1), low below 0 and high above 1, so that a gate is exactly 0 or 1 with some probability.
    """

    low: float = -1.5
    high: float = 1.5

    def __post_init__(self) -> None:
        if not (self.low < 0 and self.high > 1 and math.isfinite(self.high - self.low)):
            raise ValueError(f"gates must be stretched from below 0 to above 1, got {self.low} and {self.high}")

    def gate(self, log_alpha: Tensor, uniform: Tensor) -> Tensor:
        """Return the gates of uniform numbers in [0, 1)."""
        return self.settled(torch.logit(uniform) + log_alpha)

    def settled(self, log_alpha: Tensor) -> Tensor:
        """Return the gates without a draw: those of u = 1 / 2."""
        return (torch.sigmoid(log_alpha) * (self.high - self.low) + self.low).clamp_(0, 1)

    def slope(self, gate: Tensor) -> Tensor:
        """Return the derivatives of gates by their log_alpha: 0 where they are 0 or 1."""
        slope = (gate - self.low) * (self.high - gate) / (self.high - self.low)
        return slope.mul_((gate > 0) & (gate < 1))

    def probability(self, log_alpha: Tensor) -> Tensor:
        """Return the probability that a gate is not 0."""
        return torch.sigmoid(log_alpha - math.log(-self.low / self.high))


class Draw(NamedTuple):
    """The gates of a tensor's entries, fp32 in its shape, and its own, fp32 0-d, if it has one."""

    entries: Tensor
    tensor: Tensor | None

    def product(self) -> Tensor:
        """Return what counts of each entry."""
        return self.entries if self.tensor is None else self.entries * self.tensor


class Gates:
    """One gate an entry, and with `structured` another one a tensor, the product of which counts.

    They learn by Adam, from the gradients of what they multiply and from a penalty, the expected number of entries
    whose gate is not 0 times a factor. Draws follow from seed, step and place.

    Args:
        parameters: name -> the tensor whose entries have gates.
        distribution: of a gate.
        log_alpha: what each begins with.
        structured: whether tensors have gates too.
        penalty: what an expected entry costs, in units of the loss.
        lr: Adam's learning rate.
        seed: of the draws.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        distribution: HardConcrete,
        *,
        log_alpha: float,
        structured: bool,
        penalty: float,
        lr: float,
        seed: int,
    ) -> None:
        self.distribution, self.penalty, self.seed = distribution, penalty, seed
        self._places = {name: 2 * place for place, name in enumerate(parameters)}
        self.entries = {
            name: torch.full(p.shape, log_alpha, dtype=torch.float32, device=p.device)
            for name, p in parameters.items()
        }
        self.tensors = {
            name: torch.tensor(log_alpha, dtype=torch.float32, device=p.device)
            for name, p in parameters.items()
            if structured
        }
        self._optimizer = torch.optim.Adam([*self.entries.values(), *self.tensors.values()], lr=lr)

    def drawn(self, name: str, step: int) -> Draw:
        """Return the gates of a tensor at a step."""
        place = self._places[name]
        entries = self._draw(self.entries[name], step, place)
        return Draw(entries, self._draw(self.tensors[name], step, place + 1) if self.tensors else None)

    def settled(self, name: str) -> Tensor:
        """Return the gates of a tensor's entries without a draw, fp32 in its shape."""
        entries = self.distribution.settled(self.entries[name])
        return entries.mul_(self.distribution.settled(self.tensors[name])) if self.tensors else entries

    def expected(self) -> float:
        """Return the expected number of entries whose gate is not 0."""
        return math.fsum(float(self._probabilities(name).sum(dtype=torch.float64)) for name in self.entries)

    def take_gradient(self, name: str, draw: Draw, gradient: Tensor) -> None:
        """Take the gradients of a tensor's gates, and those of the penalty.

        gradient: of the loss by the product of each entry, fp32, in the tensor's shape or 0-d.
        """
        open_ = self.distribution.probability(self.entries[name])
        of_entries = self.penalty * open_ * (1 - open_)
        if draw.tensor is not None:
            whole, slope = self.distribution.probability(self.tensors[name]), self.distribution.slope(draw.tensor)
            of_tensor = self.penalty * whole * (1 - whole) * open_.sum()
            self.tensors[name].grad = (gradient * draw.entries).sum() * slope + of_tensor
            gradient, of_entries = gradient * draw.tensor, of_entries * whole
        self.entries[name].grad = gradient * self.distribution.slope(draw.entries) + of_entries

    def step(self) -> None:
        """Have all gates learn from their gradients."""
        self._optimizer.step()
        self.forget_gradients()

    def forget_gradients(self) -> None:
        """Leave out the step that gradients were taken for."""
        self._optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return log-alphas, and what Adam knows of each, by place."""
        return {"entries": self.entries, "tensors": self.tensors, "adam": self._optimizer.state_dict()["state"]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state of gates of the same tensors."""
        for own, saved in self._pairs(state):
            own.copy_(saved)
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": copy.deepcopy(state["adam"])})

    def _pairs(self, state: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
        for own, saved in ((self.entries, state["entries"]), (self.tensors, state["tensors"])):
            yield from ((log_alpha, saved[name]) for name, log_alpha in own.items())

    def _draw(self, log_alpha: Tensor, step: int, place: int) -> Tensor:
        generator = generator_at(self.seed, step, place, log_alpha.device)
        uniform = torch.rand(log_alpha.shape, generator=generator, device=log_alpha.device)
        return self.distribution.gate(log_alpha, uniform)

    def _probabilities(self, name: str) -> Tensor:
        """Return the probability of each entry that its gate is not 0."""
        entries = self.distribution.probability(self.entries[name])
        return entries * self.distribution.probability(self.tensors[name]) if self.tensors else entries


def shapes_of_gates(shapes: Mapping[str, Sequence[int]], structured: bool, steps: int) -> dict[str, Any]:
    """Return the shapes of what `Gates.state_dict` has after some steps, of parameters of these shapes."""
    tensors: dict[str, Sequence[int]] = dict.fromkeys(shapes, ()) if structured else {}
    learned = [*shapes.values(), *tensors.values()] if steps else []
    adam = {place: {"step": (), "exp_avg": shape, "exp_avg_sq": shape} for place, shape in enumerate(learned)}
    return {"entries": shapes, "tensors": tensors, "adam": adam}
