"""Capture: while the model runs, operations on scored parameters are replaced by ones whose backward feeds the Fisher.

Interception is at the level of operations, not of modules: most raw parameters of transformers models never pass
through a module of their own. A captured operation sees its parameter detached. So an edge of the autograd graph that
still leads to a parameter is a use that was not captured, whatever it was, and the graph itself is the proof of
completeness (`escaped`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sparseft.fisher import (
    bmm,
    channel_norm,
    composite,
    conv,
    elementwise,
    embedding,
    experts,
    gather,
    linear,
    norm,
)
from sparseft.fisher import layout as layouts
from sparseft.fisher.contribution import Contribution
from sparseft.fisher.fan_out import FanOut, outlets
from sparseft.fisher.layout import Layout, Rows
from sparseft.fisher.nest import tensors
from sparseft.fisher.shared import Shared, Source, mark, marks
from sparseft.fisher.transcript import Transcript

RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    **linear.RULES,
    **conv.RULES,
    **experts.RULES,
    **bmm.RULES,
    **embedding.RULES,
    **norm.RULES,
    **channel_norm.RULES,
    **composite.RULES,
    **elementwise.RULES,
}
_LAYERS = (F.linear, F.layer_norm, F.rms_norm)  # their data is the first argument
# what only looks at a tensor: a model does so as often as it computes
_LOOKS = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "layout", "requires_grad")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "is_floating_point", "is_contiguous")),
}
AS_DATA = -1  # the occurrence of uses of a parameter as data


@dataclass(eq=False)
class Use:
    """One captured use of one parameter: its name, which of its uses it is, which rule serves it."""

    name: str
    occurrence: int
    rule: str
    layout: Layout
    rows: Rows | None = None  # of the parameter, if the use takes only these
    ids: Tensor | None = None  # [N, L], of an embedding

    @property
    def names(self) -> frozenset[str]:
        """Return the name, as a set."""
        return frozenset([self.name])


@dataclass(frozen=True)
class _Known:
    name: str
    tensor: Tensor
    rows: Rows | None = None


class Policy(Protocol):
    """Decides which uses are captured."""

    def layout(self, name: str, occurrence: int, sizes: tuple[int, ...], source: Source) -> Layout | None:
        """Return how the batch lies in a use with these two leading sizes, None to leave the operation alone."""

    def fan_out(
        self, names: frozenset[str], occurrence: int, sizes: tuple[int, int], with_batch: bool
    ) -> FanOut | None:
        """Return how the batch lies where a shared tensor is copied so often along its first two axes.

        names: of the parameters it was computed from; occurrence: which of the places of such tensors; with_batch: the
        operation sees the batch. None: the copies are not those of samples.
        """


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
        self.autocast: torch.dtype | None = None  # of the model, while it ran
        self.repeated = False  # a parameter was repeated for every sample: whose copy goes where, the loss cannot tell
        self.emit: Callable[[Use, Contribution], None]
        # every captured operation depends on it, so that backward reaches those whose inputs need no gradient
        self.anchor = torch.zeros((), requires_grad=True)
        self.policy = policy
        self.shared = Shared(self)
        self._parameters = parameters
        self._known = {id(p): _Known(name, p) for name, p in parameters.items()}
        self._occurrences: dict[str, int] = {}
        self._source = Source.DATA
        self._claimed: list[Use] = []
        self._transcript: Transcript | None = None  # in a region
        self._entered = 0
        self._passed = False  # the batch's backward passes through a part of what all samples share
        self._device = next(iter(parameters.values())).device.type
        self.stop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LOOKS:
            return func(*args, **kwargs)
        if func in gather.WATCHED:
            gather.WATCHED[func](self, *args, **kwargs)
        # without grad mode nothing is recorded for backward, in an ordinary pass as little as here
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        # it may be on inside the model alone
        if torch.is_autocast_enabled(self._device):
            self.autocast = torch.get_autocast_dtype(self._device)
        if func in composite.COMPOSITES:
            with self:
                return composite.body(func)(*args, **kwargs)
        if self._transcript is None:
            return self._operate(func, args, kwargs)
        given = tensors((args, kwargs))
        self.shared.know(given, self._transcript.known(func))
        facts = self.shared.facts(given)
        result = self._operate(func, args, kwargs)
        # what looks at tensors, or computes without a gradient, need not be the same each time
        if any(tensor.requires_grad for tensor in tensors(result)):
            self._transcript.pass_over(func, facts)
        return result

    def _operate(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._claimed = []
        if func in _LAYERS and args and self.knows(args[0]):
            args = (self.shared.data(args[0]), *args[1:])
        origin = self.shared.origin(args, kwargs)
        self._source, self._claimed = origin.source, []
        rule = RULES.get(func)
        result = None if rule is None else rule(self, *args, **kwargs)
        if result is None:
            return self.shared.apply(func, args, kwargs, origin)
        alone = [use.name for use in self._claimed if use.layout is Layout.ALONE]
        return self.shared.add(result, origin.names.union(alone)) if alone else result

    def __enter__(self) -> Capture:
        self._entered += 1
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._entered -= 1
        if not self._entered:
            self.shared.close()

    @contextmanager
    def region(self) -> Iterator[Callable[[], Capture]]:
        """Enter a region that will run again; yield what makes a capture for each time that it does.

        Such a capture decides as this one did, and what it captures counts nowhere.
        """
        outer = self._transcript
        self._transcript = Transcript() if outer is None else outer
        reading = self._transcript.here()
        occurrences, shared, rows_chosen = dict(self._occurrences), self.shared.occurrences(), self.rows_chosen

        def again() -> Capture:
            capture = Capture(self._parameters, self.policy, self.samples)
            capture._known = dict(self._known)
            capture._occurrences, capture.rows_chosen = dict(occurrences), rows_chosen
            capture.shared.start_at(shared)
            capture._transcript = reading()
            return capture

        try:
            yield again
        finally:
            self._transcript = outer

    def kept(self) -> AbstractContextManager[Any]:
        """Return a context in which a region's operations save tensors for good.

        For what all samples share: it is small, and is pulled back through once a sample.
        """
        if self._transcript is None:
            return nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(_itself, _itself)

    def knows(self, tensor: Any) -> bool:
        """Return whether a tensor is a scored parameter or holds the entries of one."""
        return id(tensor) in self._known

    def name(self, tensor: Tensor) -> str | None:
        """Return the name of the parameter that a tensor is, or holds entries of."""
        known = self._known.get(id(tensor))
        return None if known is None else known.name

    def computed(self, *tensors: Tensor | None) -> bool:
        """Return whether one of the tensors has a gradient to pass on: it is computed, and no parameter."""
        return any(tensor is not None and tensor.requires_grad and not self.knows(tensor) for tensor in tensors)

    def alias(self, source: Tensor, result: Tensor, rows: Rows | None = None) -> Tensor:
        """Note that `result` holds the entries of a known tensor, up to a constant, a dtype or a shape; return it.

        rows: it holds only these rows of the parameter.
        """
        if result.requires_grad:
            known = self._known[id(source)]
            self._known[id(result)] = _Known(known.name, result, rows or known.rows)
        return result

    def whole(self, tensor: Tensor) -> bool:
        """Return whether a tensor holds all entries of a known parameter, in its shape."""
        known = self._known.get(id(tensor))
        return known is not None and known.rows is None and tensor.shape == self._parameters[known.name].shape

    def claim(
        self,
        tensor: Tensor | None,
        result: Sequence[int],
        rule: str,
        *,
        same_shape: bool = False,
        anywhere: bool = False,
    ) -> Use | None:
        """Return the use to feed if this use of the tensor is to be captured, None if it must be left alone.

        result: shape of the operation's result, or of its data; same_shape: refuse a tensor that is a reshaped
        parameter; anywhere: the rule finds the samples by `split`, so they need not lie one after the other.
        """
        if tensor is None or id(tensor) not in self._known:
            return None
        known = self._known[id(tensor)]
        own = self._parameters[known.name].shape
        if same_shape and tensor.shape != (own if known.rows is None else (tensor.shape[0], *own[1:])):
            return None
        occurrence = self._occurrences.get(known.name, 0)
        self._occurrences[known.name] = occurrence + 1
        layout = self.policy.layout(known.name, occurrence, tuple(result[:2]), self._source)
        if layout is None or not (anywhere or layout in (Layout.BATCH, Layout.FLAT)):
            return None
        if self.rows_chosen and len(result) == 2 and layout is not Layout.ALONE:
            return None
        return self._use(Use(known.name, occurrence, rule, layout, known.rows))

    def claim_data(self, tensor: Tensor) -> Use | None:
        """Return the use to feed if a known tensor is itself the data of an operation, None to leave it alone."""
        known = self._known[id(tensor)]
        layout = self.policy.layout(known.name, AS_DATA, (), Source.PARAMETERS)
        return None if layout is None else self._use(Use(known.name, AS_DATA, "data", layout, known.rows))

    def _use(self, use: Use) -> Use:
        self.uses.append(use)
        self._claimed.append(use)
        return use

    def run(self, function: type[torch.autograd.Function], *args: Any) -> Tensor:
        """Apply a captured operation."""
        alone = [use for use in self._claimed if use.layout is Layout.ALONE]
        with self.kept() if alone else nullcontext():
            result: Tensor = function.apply(self, self.anchor, *args)
        mark(result, alone)
        return result

    def sealed(self, tensor: Tensor, use: Use | None) -> Tensor:
        """Return the tensor as a captured operation may see it: without an edge to its parameter if it is captured."""
        return tensor if use is None else tensor.detach()

    def split(self, tensor: Tensor, use: Use | None = None) -> Tensor:
        """Return a tensor that lies as the data of a use does as [N, r, ...]; [1, r, ...] if all samples share it.

        Without a use, samples are taken to lie one after the other; where they do not, the probe finds that out.
        """
        return layouts.by_sample(tensor, Layout.FLAT if use is None else use.layout, self.samples)

    def by_sample(self, tensor: Tensor, use: Use | None = None) -> Tensor:
        """Return a tensor [..., H] that lies as the data of a use does as [N, T, H]."""
        rows = self.split(tensor, use)
        return rows.reshape(len(rows), -1, tensor.shape[-1])

    def backward(self, outputs: Tensor, cotangent: Tensor, retain_graph: bool = False) -> None:
        """Emit what all captured uses contribute when outputs are pulled back: the batch's first, then the shared."""
        retain_graph = retain_graph or self._passed
        torch.autograd.grad(outputs, [self.anchor], cotangent, retain_graph=retain_graph, allow_unused=True)
        self.shared.pull_back()

    def stop(self) -> None:
        """Drop what is emitted from now on."""
        self.emit = lambda use, contribution: None
        self.shared.witness = lambda fan_out, grads: None

    def escaped(self, outputs: Tensor) -> dict[str, str]:
        """Return the parameters that some operation uses uncaptured, name -> reason.

        Uses that all samples share, and that the outputs do not depend on, are forgotten.
        """
        found: dict[str, str] = {}
        shared: list[Any] = []
        reached: set[Use] = set()
        passed = set()
        for node, child in _edges([outputs.grad_fn]):
            for use in marks(child):
                found[use.name] = f"what is computed from it alone meets the batch in {node.name()}"
            shared += outlets(child)
            passed.add(child)
        below = {*shared, *(child for _, child in _edges(shared))}
        # parameters, and the anchor, are where both end
        self._passed = any(not hasattr(node, "variable") for node in below & passed)
        for node, child in _edges([outputs.grad_fn, *shared]):
            reached.update(marks(child))
            known = self._known.get(id(getattr(child, "variable", None)))
            if known is not None:
                found[known.name] = f"no rule captures its use in {node.name()}"
        self.uses = [use for use in self.uses if use.layout is not Layout.ALONE or use in reached]
        return found


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _edges(roots: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Yield (node, child) of the autograd graph below some nodes, each child once."""
    stack = [root for root in roots if root is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
                yield node, child
