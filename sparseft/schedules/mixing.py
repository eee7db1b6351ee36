"""Layers that compute with weights mixed with the pretrained ones, at random; the weights stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.low_bits import mix, mixed_seed


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
        if not 0 <= p < 1:
            raise ValueError(f"the probability of pretrained weights must lie in [0, 1), got {p}")
        self.p, self.seed, self._step, self._inputs = p, seed, step, dict(inputs)
        parameters = dict(model.named_parameters())
        self.pretrained = {name: parameters[name].detach().clone() for name in inputs}
        names = {id(parameters[name]): name for name in inputs}
        self._handles: list[Any] = []
        for module in model.modules():
            its = {key: names[id(p)] for key, p in module._parameters.items() if id(p) in names}
            if its:
                self._watch(module, its)

    def close(self) -> None:
        """Have the layers compute with their weights again."""
        for handle in self._handles:
            handle.remove()

    def kept(self, name: str, step: int) -> Tensor:
        """Return which columns or entries of a weight are its own at a step, bool, in a shape that fits it."""
        weight, inputs = self.pretrained[name], self._inputs[name]
        shape = [size if inputs in (dim, None) else 1 for dim, size in enumerate(weight.shape)]
        place = list(self._inputs).index(name)
        generator = torch.Generator(weight.device).manual_seed(mix(mix(mixed_seed(self.seed) ^ step) ^ place))
        return torch.rand(shape, generator=generator, device=weight.device) >= self.p

    def mixed(self, name: str, weight: Tensor, step: int) -> Tensor:
        """Return what a layer computes with in place of its weight."""
        pretrained = self.pretrained[name]
        return torch.where(self.kept(name, step), torch.lerp(pretrained, weight, 1 / (1 - self.p)), pretrained)

    def _watch(self, mine: nn.Module, names: dict[str, str]) -> None:
        def before(module: nn.Module, args: Any) -> None:
            step = self._step()
            # hooks are copied with a model, whose weights these are not
            if module is mine and module.training and step is not None:
                for key, name in names.items():
                    weight = module._parameters[key]
                    if weight is not None:
                        # is found before the parameter of that name
                        module.__dict__[key] = self.mixed(name, weight, step)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if module is mine:
                for key in names:
                    module.__dict__.pop(key, None)

        self._handles.append(mine.register_forward_pre_hook(before))
        self._handles.append(mine.register_forward_hook(after, always_call=True))
