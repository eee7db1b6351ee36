"""Modules that compute with other tensors in place of their parameters; the parameters stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# name, parameter, whether its module is in training mode -> the tensor to compute with, None for the parameter itself
InPlaceOf = Callable[[str, Tensor, bool], Tensor | None]

_UNCOMPILED = "a schedule has this module compute with other weights, which is not compiled; leave fullgraph out"


class Substitution:
    """Puts tensors in front of parameters for the forward passes of the modules that own them.

    Recomputed forward passes have them too. What reads a parameter from outside its module's forward pass sees the
    parameter. In a model that is compiled, these modules run uncompiled.

    Args:
        model: owns the parameters.
        names: of the parameters.
        in_place_of: makes the tensor, at each forward pass; gradients flow through it to the parameter.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], in_place_of: InPlaceOf) -> None:
        parameters = dict(model.named_parameters())
        by_id = {id(parameters[name]): name for name in names}
        self._in_place_of = in_place_of
        self._covered: list[tuple[nn.Module, Callable[..., Any], Any]] = []
        self._hooks: list[RemovableHandle] = []
        self._closed = False
        for module in model.modules():
            its = {key: by_id[id(p)] for key, p in module._parameters.items() if id(p) in by_id}
            if its:
                self._cover(module, its)

    def close(self) -> None:
        """Have the modules compute with their parameters again."""
        self._closed = True
        for module, cover, before in self._covered:
            # unless somebody else's forward calls it by now
            if module.__dict__.get("forward") is cover:
                del module.__dict__["forward"]
                if before is not None:
                    module.__dict__["forward"] = before
        for hook in self._hooks:
            hook.remove()
        self._covered, self._hooks = [], []

    def _cover(self, mine: nn.Module, names: Mapping[str, str]) -> None:
        # compiled code has guards on a module's own forward, and none on what stands in front of its parameters
        @torch.compiler.disable(reason=_UNCOMPILED)  # type: ignore[untyped-decorator]
        def forward(module: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            # copied with a model, whose parameters these are not
            if module is not mine or self._closed:
                return inner(*args, **kwargs)
            try:
                for key, name in names.items():
                    parameter = module._parameters[key]
                    other = None if parameter is None else self._in_place_of(name, parameter, module.training)
                    if other is not None:
                        # is found before the parameter of that name
                        module.__dict__[key] = other
                # what the module itself compiles, too
                with torch.compiler.set_stance("force_eager"):
                    return inner(*args, **kwargs)
            finally:
                for key in names:
                    module.__dict__.pop(key, None)

        before = mine.__dict__.get("forward")
        # copies of a model get copies of its arguments
        cover = partial(forward, mine, mine.forward)
        # for who asks for the arguments
        cover.__wrapped__ = mine.forward  # type: ignore[attr-defined]
        mine.__dict__["forward"] = cover
        self._covered.append((mine, cover, before))
        # a layer whose fast path reads its modules' parameters, as TransformerEncoderLayer's does in evaluation, calls
        # modules with hooks
        self._hooks.append(mine.register_forward_pre_hook(_nothing))


def _nothing(module: nn.Module, args: Any) -> None:
    """Do nothing: it is there to be seen."""
