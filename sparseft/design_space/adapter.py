"""A bottleneck adapter behind a layer. Source: arXiv 1902.00751, placed once a layer as in 2005.00247."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_NAME = "bottleneck_adapter"


class BottleneckAdapter(nn.Module):
    """x + up(relu(down(x))): the identity until it is trained.

    Args:
        features: of the layer's output.
        width: of the bottleneck.
    """

    def __init__(self, features: int, width: int):
        super().__init__()
        self.down = nn.Linear(features, width)
        self.up = nn.Linear(width, features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted hidden states, [..., features]."""
        return x + torch.as_tensor(self.up(torch.relu(self.down(x))))


def attach_adapter(layer: nn.Module, features: int, width: int) -> BottleneckAdapter:
    """Put an adapter behind a layer whose output is hidden states, or a tuple that begins with them.

    It becomes a module of the layer, in its dtype and on its device, so copies and state dicts of the model have it.
    """
    like = next(layer.parameters())
    adapter = BottleneckAdapter(features, width).to(like.device, like.dtype)
    layer.add_module(_NAME, adapter)
    layer.register_forward_hook(_adapt)
    return adapter


def _adapt(layer: nn.Module, inputs: Any, output: Any) -> Any:
    # the layer's own adapter, not one bound here: a copy of the model must use the copy
    adapter = layer.get_submodule(_NAME)
    if isinstance(output, tuple):
        return (adapter(output[0]), *output[1:])
    return adapter(output)
