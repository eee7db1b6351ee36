"""What the rows and columns of a parameter are: the weights into one output neuron, and those out of one input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd


class Layout(NamedTuple):
    """A view of a parameter whose dimensions tell its output neurons and its inputs.

    Attributes:
        shape: of the view, in C order.
        rows: the dimensions that count output neurons; none where the parameter is one row.
        columns: the dimensions that count inputs; none where it is one column.
    """

    shape: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @classmethod
    def usual(cls, shape: Sequence[int]) -> Layout:
        """Return that of [O, I, ...], a Linear's or a convolution's; a vector is one row and one column."""
        return cls(tuple(shape), (0,), (1,)) if len(shape) > 1 else cls((math.prod(shape),), (), ())


def layouts(model: nn.Module) -> dict[str, Layout]:
    """Return parameter name -> layout, by the module that owns the parameter.

    - Linear [O, I] and Embedding [V, D]: a row is an output neuron, or a token's vector; of a tied head it is both.
    - transformers' Conv1D [I, O]: a row is an output neuron, which lies along the second dimension.
    - Convolutions [O, I / groups, ...], transposed ones [I, O / groups, ...]: a row is an output channel, with all its
      kernels; a column is an input channel.
    - Other tensors of three and more dimensions are stacks of matrices [E, O, I], as those of experts (or [E, I, O],
      where their module says `is_transposed`): every matrix has its own rows and columns.
    - Vectors (biases, norms) are one row and one column each.
    """
    found: dict[int, Layout] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            found.setdefault(id(parameter), _layout(module, tuple(parameter.shape)))
    return {name: found[id(parameter)] for name, parameter in model.named_parameters()}


def _layout(module: nn.Module, shape: tuple[int, ...]) -> Layout:
    if isinstance(module, _ConvNd) and len(shape) > 2:
        grouped = (module.groups, shape[0] // module.groups, *shape[1:])
        inputs, outputs = (1, 2) if module.transposed else (2, 1)
        return Layout(grouped, (0, outputs), (0, inputs))
    if type(module).__name__ == "Conv1D" and len(shape) == 2:
        return Layout(shape, (1,), (0,))
    if len(shape) > 2:
        *stack, first, second = range(len(shape))
        inputs, outputs = (first, second) if getattr(module, "is_transposed", False) else (second, first)
        return Layout(shape, (*stack, outputs), (*stack, inputs))
    return Layout.usual(shape)
