"""The model's state during a pass: evaluation mode, gradients for what is scored; everything as found afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from sparseft.fisher.experts import visible_experts


@contextmanager
def evaluation(model: nn.Module, scored: Mapping[str, Tensor]) -> Iterator[None]:
    """Put the model into evaluation mode with gradients for the scored parameters only; undo it on any way out.

    Modules' training flags, parameters' requires_grad and buffers are restored. Parts compiled by torch.compile run
    uncompiled meanwhile: their operations could not be seen otherwise.
    """
    training = [(module, module.training) for module in model.modules()]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer, buffer._version, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    wanted = {id(parameter) for parameter in scored.values()}
    try:
        model.eval()
        for parameter, _ in required:
            parameter.requires_grad_(id(parameter) in wanted)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(visible_experts(model))
            if any(_compiled(module) for module, _ in training):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter, flag in required:
            parameter.requires_grad_(flag)
        for module, name, buffer, version, value in buffers:
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(value)
            module._buffers[name] = buffer


def _compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
