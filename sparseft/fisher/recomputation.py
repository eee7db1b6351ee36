"""Activation checkpointing: regions of the model that keep only their inputs, and run again in backward.

What the second run saves takes the place of what the first did not keep; its graph is thrown away. So it must run the
same operations, captured or not, and nothing that it captures may count. No mode is entered in backward: each run
again is under a capture of its own, which goes on from where the first stood when the region began.

torch tells nobody that a region begins, and models hold `checkpoint` under names of their own. So what it calls is
replaced while a pass runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils import checkpoint as checkpointing

from sparseft.fisher.capture import Capture


@contextmanager
def recomputation(model: nn.Module) -> Iterator[None]:
    """Let captures follow regions that run again, and layers of transformers be such regions; undo it on any way out.

    Those layers are checkpointed in training only. They stay so here if they were, with `use_reentrant=False`.

    Raises:
        RuntimeError: reentrant checkpointing, or a region that does something else when it runs again.
    """
    replaced: dict[str, Callable[[Any], Any]] = {"_checkpoint_hook": _followed, "CheckpointFunction": _Refused}
    before = {name: getattr(checkpointing, name) for name in replaced if hasattr(checkpointing, name)}
    try:
        for name, original in before.items():
            setattr(checkpointing, name, replaced[name](original))
        with _checkpointed_layers(model):
            yield
    except RuntimeError as error:
        if "checkpoint" not in str(error):
            raise
        raise RuntimeError(
            "activation checkpointing must be that of torch.utils.checkpoint with use_reentrant=False, of regions "
            f"that run the same operations each time, got: {str(error).splitlines()[0]}; pass use_reentrant=False, "
            "switch checkpointing off while the Fisher is estimated, or use `batch_one_fisher`"
        ) from error
    finally:
        for name, original in before.items():
            setattr(checkpointing, name, original)


_Hook = Callable[[Any], AbstractContextManager[Any]]


def _followed(hook: _Hook) -> _Hook:
    """Return what is entered around a region in place of `hook`; its argument holds what runs the region again."""

    @contextmanager
    def following(frame: Any) -> Iterator[None]:
        capture = _entered()
        with nullcontext() if capture is None else capture.region() as again, hook(frame):
            if again is not None:
                frame.recompute_fn = functools.partial(_under, again, frame.recompute_fn)
            yield

    return following


def _under(again: Callable[[], Capture], function: Callable[..., None], *args: Any) -> None:
    with again():
        function(*args)


class _Refused:
    """Stands for the function of reentrant checkpointing: its first run leaves no graph, so that nothing is seen."""

    def __init__(self, original: type[torch.autograd.Function]) -> None:
        self._original = original

    def apply(self, *args: Any) -> Any:
        if torch.is_grad_enabled() and _entered() is not None:
            raise RuntimeError("torch.utils.checkpoint.checkpoint(..., use_reentrant=True)")
        return self._original.apply(*args)


def _entered() -> Capture | None:
    """Return the capture that operations of this thread go through."""
    modes = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, Capture)]
    return modes[-1] if modes else None


@contextmanager
def _checkpointed_layers(model: nn.Module) -> Iterator[None]:
    """Let layers of transformers that are checkpointed in training be so in evaluation mode."""
    layers: list[Any] = [module for module in model.modules() if _is_checkpointed(module)]
    functions = [layer._gradient_checkpointing_func for layer in layers]
    try:
        for layer, function in zip(layers, functions, strict=True):
            # a layer asks its own flag alone whether to be checkpointed, and has it back before anything else runs
            layer.training = True
            layer.__dict__["_gradient_checkpointing_func"] = functools.partial(_in_evaluation, layer, function)
        yield
    finally:
        for layer, function in zip(layers, functions, strict=True):
            layer.training = False
            layer.__dict__["_gradient_checkpointing_func"] = function


def _is_checkpointed(module: Any) -> bool:
    if not any(base.__name__ == "GradientCheckpointingLayer" for base in type(module).__mro__):
        return False
    options = getattr(vars(module).get("_gradient_checkpointing_func"), "keywords", {})
    return bool(module.gradient_checkpointing) and options.get("use_reentrant") is False


def _in_evaluation(layer: nn.Module, checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
    """Checkpoint the function of a layer, which finds the layer in evaluation mode each time it runs."""

    def evaluated(*args: Any) -> Any:
        layer.training = False
        try:
            return function(*args)
        finally:
            layer.training = True

    # a key-value cache would be filled again; the layer leaves out those that it is given by name
    return checkpoint(evaluated, *(None if hasattr(arg, "get_seq_length") else arg for arg in args))
