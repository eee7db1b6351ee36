"""Layers that compute with weights mixed with the pretrained ones, at random; the weights stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from sparseft.schedules.draws import generator_at
from sparseft.schedules.substitution import Substitution
from sparseft.selection.arguments import check_number, check_whole


class Mixing:
    """Has layers, in training mode, take a random part of their weights from the pretrained ones.

    Of an entry of W, or of a column, all weights out of one input, the layer takes W0 + (W - W0) / (1 - p) with
    probability 1 - p, and W0 otherwise: W in the mean. Gradients are those of what the layer computes.

    A step has one draw a weight, of all its forward passes, recomputed ones included. It follows from the seed, the
    step and the weight's place, so that a resumed run draws the same.

    Args:
        model: holds the layers.
        inputs: parameter name -> the dimension of it that counts the layer's inputs, where columns are drawn; None
            where entries are.
        p: probability that a column or an entry is the pretrained one, in [0, 1).
        seed: of the draws.
        step: returns the optimizer step that forward passes are of, or None while nothing is to be mixed.

    Attributes:
        pretrained: parameter name -> the values to mix with: those of now.

    Source: the columns of DPS Mix, arXiv 2211.01642; mixing, Mixout, arXiv 1909.11299.
    """

    def __init__(
        self, model: nn.Module, inputs: Mapping[str, int | None], p: float, seed: int, step: Callable[[], int | None]
    ) -> None:
        check_number("the probability of pretrained weights", p)
        check_whole("seed", seed)
        if not 0 <= p < 1:
            raise ValueError(f"the probability of pretrained weights must lie in [0, 1), got {p}")
        self.p, self.seed, self._step, self._inputs = p, seed, step, dict(inputs)
        parameters = dict(model.named_parameters())
        self.pretrained = {name: parameters[name].detach().clone() for name in inputs}
        self._substitution = Substitution(model, inputs, self._in_place_of)

    def close(self) -> None:
        """Have the layers compute with their weights again."""
        self._substitution.close()

    def kept(self, name: str, step: int) -> Tensor:
        """Return which columns or entries of a weight are its own at a step, bool, in a shape that fits it."""
        weight, inputs = self.pretrained[name], self._inputs[name]
        shape = [size if inputs in (dim, None) else 1 for dim, size in enumerate(weight.shape)]
        generator = generator_at(self.seed, step, list(self._inputs).index(name), weight.device)
        return torch.rand(shape, generator=generator, device=weight.device) >= self.p

    def mixed(self, name: str, weight: Tensor, step: int) -> Tensor:
        """Return what a layer computes with in place of its weight."""
        pretrained = self.pretrained[name]
        return torch.where(self.kept(name, step), torch.lerp(pretrained, weight, 1 / (1 - self.p)), pretrained)

    def _in_place_of(self, name: str, weight: Tensor, training: bool) -> Tensor | None:
        step = self._step()
        return self.mixed(name, weight, step) if training and step is not None else None
