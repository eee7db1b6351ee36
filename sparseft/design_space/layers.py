"""Which layers a model has: its stacks of numbered modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Layer:
    """One layer of a stack.

    Attributes:
        stack: name of the list it is in: `bert.encoder.layer`, `decoder.block`.
        number: its place there, from 0 on.
    """

    stack: str
    number: int

    @property
    def name(self) -> str:
        """Name of the module."""
        return f"{self.stack}.{self.number}" if self.stack else str(self.number)

    def owns(self, name: str) -> bool:
        """Return whether a module or parameter of this name lies in the layer."""
        return name.startswith(self.name + ".")


def find_layers(model: nn.Module, stacks: Sequence[str] | None = None) -> list[list[Layer]]:
    """Return the layers of a model, one list for each stack, in the model's order.

    A stack is a list of two or more modules of one class, all with parameters of their own, whose numbers are the
    first in the names of its parameters: `bert.encoder.layer.3.*`, `transformer.h.3.*`, `model.layers.3.*`, and both
    `encoder.block.3.*` and `decoder.block.3.*`. What is in none (embeddings, a final norm, a head) is outside.

    Args:
        model: any model.
        stacks: names of the lists to use, in place of those found: for a model that has other lists too.

    Raises:
        ValueError: there is no such stack.
    """
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList | nn.Sequential)
    }
    if stacks is None:
        found = [name for name, module in lists.items() if _is_stack(module)]
        found = [name for name in found if not any(name != outer and _inside(name, outer) for outer in found)]
        if not found:
            raise ValueError(
                f"{type(model).__name__} has no layers: no list of two or more modules of one class is in it; name "
                "its lists with stacks="
            )
    else:
        found = [stacks] if isinstance(stacks, str) else list(stacks)
        unknown = [name for name in found if name not in lists or not len(lists[name])]
        if unknown or not found:
            raise ValueError(f"stacks must be names of lists of modules, got {unknown}; there are {list(lists)[:6]}")
    return [[Layer(name, number) for number in range(len(lists[name]))] for name in found]


def _is_stack(modules: nn.ModuleList | nn.Sequential) -> bool:
    kinds = {type(module) for module in modules}
    return len(modules) > 1 and len(kinds) == 1 and all(any(True for _ in module.parameters()) for module in modules)


def _inside(name: str, outer: str) -> bool:
    return not outer or name.startswith(outer + ".")
