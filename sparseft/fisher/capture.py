"""Capture: while the model runs, operations on scored parameters are replaced by ones whose backward feeds the Fisher.

Interception is at the level of operations, not of modules: most raw parameters of transformers models never pass
through a module of their own. A captured operation sees its parameter detached. So an edge of the autograd graph that
still leads to a parameter is a use that was not captured, whatever it was, and the graph itself is the proof of
completeness (`escaped`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sparseft.fisher import bmm, channel_norm, conv, elementwise, embedding, experts, gather, linear, norm
from sparseft.fisher.contribution import Contribution

RULES: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    **linear.RULES,
    **conv.RULES,
    **experts.RULES,
    **bmm.RULES,
    **embedding.RULES,
    **norm.RULES,
    **channel_norm.RULES,
    **elementwise.RULES,
}


class Layout(Enum):
    """How the samples of a batch lie in the leading dimension of an operation."""

    BATCH = auto()  # [N, ...]
    FLAT = auto()  # [N * r, ...], sample after sample
    SHARED = auto()  # no batch dimension: the same ids for every sample, to be expanded to [N, ...]


@dataclass(eq=False)
class Use:
    """One captured use of one parameter: its name, which of its uses it is, which rule serves it."""

    name: str
    occurrence: int
    rule: str
    shared: bool
    ids: Tensor | None = None  # [N, L], of an embedding


class Policy(Protocol):
    """Decides which uses are captured."""

    def layout(self, name: str, occurrence: int, rows: int, shareable: bool) -> Layout | None:
        """Return how the batch lies in a use with `rows` leading entries, None to leave the operation alone."""


class Capture(TorchFunctionMode):
    """The mode that captures; enter it around the forward pass only.

    Args:
        parameters: what is scored, by name.
        policy: which uses to capture, and how the batch lies in them.
        samples: N, the number of samples in the batch.
    """

    def __init__(self, parameters: Mapping[str, Tensor], policy: Policy, samples: int) -> None:
        super().__init__()
        self.samples = samples
        self.uses: list[Use] = []
        self.rows_chosen = False  # an operation chose rows by their values
        self.repeated = False  # a parameter was repeated for every sample: whose copy goes where, the loss cannot tell
        self.emit: Callable[[Use, Contribution], None] = lambda use, contribution: None
        # every captured operation depends on it, so that backward reaches those whose inputs need no gradient
        self.anchor = torch.zeros((), requires_grad=True)
        self._policy = policy
        self._parameters = parameters
        self._known: dict[int, tuple[str, Tensor]] = {id(p): (name, p) for name, p in parameters.items()}
        self._occurrences: dict[str, int] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in gather.WATCHED:
            gather.WATCHED[func](self, *args, **kwargs)
        rule = RULES.get(func)
        # without grad mode nothing is recorded for backward, in an ordinary pass as little as here
        if rule is not None and torch.is_grad_enabled():
            result = rule(self, *args, **kwargs)
            if result is not None:
                return result
        return func(*args, **kwargs)

    def knows(self, tensor: Any) -> bool:
        """Return whether a tensor is a scored parameter or holds the entries of one."""
        return id(tensor) in self._known

    def alias(self, source: Tensor, result: Tensor) -> Tensor:
        """Note that `result` holds the entries of a known tensor, up to a constant, a dtype or a shape; return it."""
        if result.requires_grad:
            self._known[id(result)] = (self._known[id(source)][0], result)
        return result

    def claim(
        self,
        tensor: Tensor | None,
        result: Sequence[int],
        rule: str,
        *,
        same_shape: bool = False,
        shareable: bool = False,
    ) -> Use | None:
        """Return the use to feed if this use of the tensor is to be captured, None if it must be left alone.

        result: shape of the operation's result; same_shape: refuse a tensor that is a reshaped parameter; shareable:
        the data may have no batch dimension and be expanded to one.
        """
        if tensor is None or id(tensor) not in self._known:
            return None
        name = self._known[id(tensor)][0]
        if same_shape and tensor.shape != self._parameters[name].shape:
            return None
        occurrence = self._occurrences.get(name, 0)
        self._occurrences[name] = occurrence + 1
        layout = self._policy.layout(name, occurrence, result[0], shareable)
        if layout is None or (self.rows_chosen and len(result) == 2):
            return None
        use = Use(name, occurrence, rule, layout is Layout.SHARED)
        self.uses.append(use)
        return use

    def run(self, function: type[torch.autograd.Function], *args: Any) -> Tensor:
        """Apply a captured operation."""
        result: Tensor = function.apply(self, self.anchor, *args)
        return result

    def sealed(self, tensor: Tensor, use: Use | None) -> Tensor:
        """Return the tensor as a captured operation may see it: without an edge to its parameter if it is captured."""
        return tensor if use is None else tensor.detach()

    def by_sample(self, tensor: Tensor) -> Tensor:
        """Return a tensor [N, ..., H] or [N * r, ..., H] as [N, T, H]."""
        return tensor.reshape(self.samples, -1, tensor.shape[-1])

    def autocast_dtype(self, x: Tensor) -> torch.dtype:
        """Return the dtype in which autocast would multiply x; its own, where autocast is off."""
        device = x.device.type
        cast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
        return torch.get_autocast_dtype(device) if cast else x.dtype

    def escaped(self, outputs: Tensor) -> dict[str, str]:
        """Return the parameters that some operation uses uncaptured, name -> reason."""
        found: dict[str, str] = {}
        stack, seen = [outputs.grad_fn], {outputs.grad_fn}
        while stack:
            node = stack.pop()
            for child, _ in node.next_functions if node is not None else ():
                if child is None or child in seen:
                    continue
                seen.add(child)
                stack.append(child)
                name, _ = self._known.get(id(getattr(child, "variable", None)), ("", None))
                if name and node is not None:
                    found[name] = f"no rule captures its use in {node.name()}"
        return found
