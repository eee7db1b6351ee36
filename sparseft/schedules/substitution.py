"""Modules that compute with other tensors in place of their parameters; the parameters stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

# name, parameter, whether its module is in training mode -> the tensor to compute with, None for the parameter itself
InPlaceOf = Callable[[str, Tensor, bool], Tensor | None]


class Substitution:
    """Puts tensors in front of parameters for the forward passes of the modules that own them.

    Recomputed forward passes have them too. What reads a parameter from outside its module's forward pass sees the
    parameter.

    Args:
        model: owns the parameters.
        names: of the parameters.
        in_place_of: makes the tensor, at each forward pass; gradients flow through it to the parameter.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], in_place_of: InPlaceOf) -> None:
        parameters = dict(model.named_parameters())
        by_id = {id(parameters[name]): name for name in names}
        self._in_place_of = in_place_of
        self._handles: list[Any] = []
        for module in model.modules():
            its = {key: by_id[id(p)] for key, p in module._parameters.items() if id(p) in by_id}
            if its:
                self._watch(module, its)

    def close(self) -> None:
        """Have the modules compute with their parameters again."""
        for handle in self._handles:
            handle.remove()

    def _watch(self, mine: nn.Module, names: dict[str, str]) -> None:
        def before(module: nn.Module, args: Any) -> None:
            # hooks are copied with a model, whose parameters these are not
            if module is not mine:
                return
            for key, name in names.items():
                parameter = module._parameters[key]
                other = None if parameter is None else self._in_place_of(name, parameter, module.training)
                if other is not None:
                    # is found before the parameter of that name
                    module.__dict__[key] = other

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if module is mine:
                for key in names:
                    module.__dict__.pop(key, None)

        self._handles.append(mine.register_forward_pre_hook(before))
        self._handles.append(mine.register_forward_hook(after, always_call=True))
