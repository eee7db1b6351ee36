"""Tensors that all samples share: computed from parameters alone, they meet the batch only later.

A relative position bias, a table of positions that passes through layers of its own, a product of two parameters.
Where such a tensor meets the batch, autograd adds its gradients over the samples, and what each contributed is lost.
So a copy for each sample is put there (a fan-out), which keeps the gradients apart. After the backward pass of the
batch, each sample's gradients are pulled back through the small graph of the shared tensors, whose operations were
captured too, as those of a batch of one; what they emit is stacked over the samples.

Whether a tensor is shared need not be proven: a fan-out whose copies each reach one sample only splits the gradient
exactly, whatever the tensor was computed from. That is what the probe shows, and the walk over the graph shows that
no path to the parameters goes round a fan-out.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseft.attention import scaled_dot_product_attention
from sparseft.fisher.composed import Composed
from sparseft.fisher.contribution import Contribution, Lookup, Outer, Vector
from sparseft.fisher.fan_out import FanOut, SharedTensor, copies_of
from sparseft.fisher.layout import Layout, by_sample
from sparseft.fisher.meeting import Meeting, changes, meeting
from sparseft.fisher.nest import replaced, tensors
from sparseft.fisher.transcript import Fact

if TYPE_CHECKING:
    from sparseft.fisher.capture import Capture, Use

_FASTER: dict[Callable[..., Any], Any] = {F.scaled_dot_product_attention: scaled_dot_product_attention}
_SMALL = 1 << 20  # entries of a parameter whose per-sample gradients may be formed


class Source(Enum):
    """What the tensors of an operation come from, beside the parameters it uses itself."""

    BATCH = auto()  # at least one has a gradient that depends on the samples
    PARAMETERS = auto()  # none has, and at least one is computed from parameters
    DATA = auto()  # none has a gradient at all: inputs, masks, constants


class Origin(NamedTuple):
    """Where an operation's tensors come from, and the parameters that shared ones among them were computed from.

    given: these tensors; known: those that are parameters.
    fed: one of them has no gradient, but differs from sample to sample: an input, or what was made of inputs alone.
    """

    source: Source
    names: frozenset[str]
    given: Sequence[Tensor] = ()
    known: Sequence[Tensor] = ()
    fed: bool = False


class _Data(torch.autograd.Function):
    """y = param, as the data of another operation."""

    @staticmethod
    def forward(ctx: Any, capture: Capture, anchor: Tensor, use: Use, param: Tensor) -> Tensor:
        ctx.capture, ctx.use = capture, use
        return param.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, ...]:
        ctx.capture.emit(ctx.use, Vector(dy.float().reshape(1, -1)))
        return (None,) * 4


class Shared:
    """Knows the shared tensors of one forward pass, and pulls gradients back through them.

    Attributes:
        fan_outs: where they meet the batch.
        witness: told what each fan-out receives in a backward pass, [N, ...].
        composed: what was computed from parameters alone, and not captured.
    """

    def __init__(self, capture: Capture) -> None:
        self.fan_outs: list[FanOut] = []
        self.composed = Composed()
        self.witness: Callable[[FanOut, Tensor], None]
        self._capture: Capture = weakref.proxy(capture)  # which holds this
        self._tensors: dict[int, SharedTensor] = {}
        self._occurrences: dict[frozenset[str], int] = {}
        self._received: dict[SharedTensor, Tensor] = {}
        self._fed: dict[int, weakref.ref[Tensor]] = {}

    def feed(self, nest: Any) -> None:
        """Note that the tensors of a nest are inputs, or made of inputs: nothing made with them is shared."""
        for tensor in tensors(nest):
            if not tensor.requires_grad:
                self._fed[id(tensor)] = weakref.ref(tensor)

    def facts(self, given: list[Tensor]) -> list[Fact]:
        """Return what is known of tensors beside parameters."""
        return [self._fact(tensor) for tensor in given]

    def know(self, given: list[Tensor], facts: Sequence[Fact]) -> None:
        """Know what was known of the tensors of an operation when it ran first."""
        for tensor, names in zip(given, facts, strict=False):
            if names is None or self._fact(tensor) == names:
                continue
            if names:
                self.add(tensor, names)
            else:
                self.feed(tensor)

    def occurrences(self) -> dict[frozenset[str], int]:
        """Return how many places of shared tensors there were so far, by the names of their parameters."""
        return dict(self._occurrences)

    def start_at(self, occurrences: Mapping[frozenset[str], int]) -> None:
        """Count places from these on."""
        self._occurrences = dict(occurrences)

    def origin(self, args: Any, kwargs: Any) -> Origin:
        """Return where the arguments of an operation come from."""
        names: frozenset[str] = frozenset()
        source, fed = Source.DATA, False
        given, known = tensors((args, kwargs)), []
        knows = self._capture.knows
        for tensor in given:
            if knows(tensor):
                known.append(tensor)
            elif not tensor.requires_grad:
                fed = fed or self._is_fed(tensor)
            else:
                shared = self._find(tensor)
                if shared is None:
                    source = Source.BATCH
                else:
                    names |= shared.names
        return Origin(Source.PARAMETERS if names and source is Source.DATA else source, names, given, known, fed)

    def add(self, result: Any, names: frozenset[str]) -> Any:
        """Note that the tensors of a result are shared; return it."""
        for tensor in tensors(result):
            if tensor.requires_grad:
                self._tensors[id(tensor)] = SharedTensor(tensor, tensor._version, names)
        return result

    def data(self, tensor: Tensor) -> Tensor:
        """Return a known tensor as a shared one, captured; itself if it must be left alone."""
        use = self._capture.claim_data(tensor) if tensor.numel() <= _SMALL else None
        if use is None:
            return tensor
        root: Tensor = self.add(self._capture.run(_Data, use, tensor.detach()), use.names)
        return root

    def close(self) -> None:
        """Let go of the tensors, whose graph holds the capture: what backward needs of them, it has."""
        self._tensors.clear()
        self._fed.clear()

    def apply(self, func: Callable[..., Any], args: Any, kwargs: Any, origin: Origin) -> Any:
        """Run an operation that no rule captures. What it makes of shared tensors and parameters alone is shared."""
        if origin.source is Source.BATCH or origin.fed:
            result = self._apply(func, args, kwargs, origin, alone=False)
        else:
            with self._capture.kept():
                result = self._apply(func, args, kwargs, origin, alone=True)
        if not origin.fed:
            changed = changes(func) and bool(args)
            given = tensors((args[1:], kwargs)) if changed else origin.given
            self.composed.note(self._capture.name, given, args[0] if changed else result)
        if origin.fed:
            self.feed(result)
        return result

    def _apply(self, func: Callable[..., Any], args: Any, kwargs: Any, origin: Origin, alone: bool) -> Any:
        known = origin.known
        if not known and not origin.names:
            return _FASTER.get(func, func)(*args, **kwargs)
        result = None
        if alone:
            # many operations only look at a parameter: its dtype, its norm for the log
            result = func(*args, **kwargs)
            if not any(tensor.requires_grad for tensor in tensors(result)):
                return result
            if changes(func):
                return result if known else self.add(result, origin.names)
        met = meeting(func, args, kwargs, [*known, *self._shared_among(args, kwargs)])
        if not alone and met is None:
            return func(*args, **kwargs)
        if known:
            table = {id(tensor): self.data(tensor) for tensor in known}
            args, kwargs = replaced(args, table), replaced(kwargs, table)
        fanned = None if met is None else self._fan_out(met, self._shared_among(args, kwargs), not alone)
        if met is not None and fanned is not None:
            copies, axis = fanned
            return met.run(replaced(args, copies), replaced(kwargs, copies), axis)
        if known or not alone:  # on what was captured of the parameters, or for the first time
            result = func(*args, **kwargs)
        names = self.origin(args, kwargs).names
        return self.add(result, names) if alone and names else result

    def receive(self, fan_out: FanOut, source: SharedTensor, grads: Tensor) -> None:
        """Take the gradients of the copies of a shared tensor, [copies, *shape]."""
        layout = Layout.BATCH if fan_out.layout is Layout.SECOND else fan_out.layout
        rows = by_sample(grads, layout, self._capture.samples)
        rows = rows.squeeze(1) if rows.shape[1] == 1 else rows.sum(1)
        self.witness(fan_out, rows)
        before = self._received.get(source)
        self._received[source] = rows if before is None else before + rows

    def pull_back(self) -> None:
        """Pull what was received back, one sample at a time, and emit what the shared uses contribute."""
        received, self._received = self._received, {}
        if not received:
            return
        capture = self._capture
        emit = capture.emit
        parts: dict[Use, list[Contribution]] = {}
        capture.emit = lambda use, part: parts.setdefault(use, []).append(part)
        try:
            for sample in range(capture.samples):
                torch.autograd.grad(
                    [source.outlet() for source in received],
                    [capture.anchor],
                    [grads[sample] for grads in received.values()],
                    retain_graph=True,
                    allow_unused=True,
                )
        finally:
            capture.emit = emit
        for use, of_samples in parts.items():
            emit(use, _stacked(of_samples))

    def forget(self) -> None:
        """Drop what was received."""
        self._received.clear()

    def _find(self, tensor: Tensor) -> SharedTensor | None:
        found = self._tensors.get(id(tensor))
        # what is changed in place may have been given something of the batch
        return found if found is not None and found.version == tensor._version else None

    def _fact(self, tensor: Tensor) -> Fact:
        if not tensor.requires_grad:
            return frozenset() if self._is_fed(tensor) else None
        found = self._find(tensor)
        return None if found is None else found.names

    def _is_fed(self, tensor: Tensor) -> bool:
        found = self._fed.get(id(tensor))
        return found is not None and found() is tensor

    def _shared_among(self, args: Any, kwargs: Any) -> list[Tensor]:
        return [tensor for tensor in tensors((args, kwargs)) if self._find(tensor) is not None]

    def _fan_out(self, met: Meeting, shared: list[Tensor], with_batch: bool) -> tuple[dict[int, Tensor], int] | None:
        """Return copies of the shared tensors, by id, and the axis they lie along; None if they do not meet it."""
        places: dict[int, tuple[SharedTensor, FanOut, int]] = {}
        for tensor in shared:
            source = self._find(tensor)
            if source is None or id(tensor) in places:
                continue
            occurrence = self._occurrences.get(source.names, 0)
            self._occurrences[source.names] = occurrence + 1
            sizes = met.sizes(tensor)
            place = self._capture.policy.fan_out(source.names, occurrence, sizes, with_batch)
            if place is None:
                return None
            places[id(tensor)] = source, place, sizes[place.layout is Layout.SECOND]
        axes = {int(place.layout is Layout.SECOND) for _, place, _ in places.values()}
        if len(axes) != 1:
            return None
        (axis,) = axes
        copies: dict[int, Tensor] = {}
        for key, (source, place, count) in places.items():
            self.fan_outs.append(place)
            copies[key] = met.spread(copies_of(source, self, self._capture.anchor, place, count), axis)
        return copies, axis


def mark(result: Tensor, uses: list[Use]) -> None:
    """Write on the node of a captured operation which uses it has in the graph of the shared tensors."""
    if uses and result.grad_fn is not None:
        result.grad_fn.alone = uses  # type: ignore[attr-defined]


def marks(node: Any) -> list[Use]:
    """Return what was written on a node of the autograd graph."""
    uses: list[Use] = getattr(node, "alone", [])
    return uses


def _stacked(parts: list[Contribution]) -> Contribution:
    """Return the contributions of single samples as one of all of them."""
    outers = [part for part in parts if isinstance(part, Outer)]
    if outers:
        return Outer(_joined([part.left for part in outers]), _joined([part.right for part in outers]))
    lookups = [part for part in parts if isinstance(part, Lookup)]
    if lookups:
        return Lookup(torch.cat([part.ids for part in lookups]), torch.cat([part.dy for part in lookups]))
    return Vector(torch.cat([part.grad for part in parts if isinstance(part, Vector)]))


def _joined(parts: list[Tensor]) -> Tensor:
    # the data of a shared use is one tensor, whichever sample's gradient came by
    first = parts[0]
    if all(part.data_ptr() == first.data_ptr() for part in parts):
        return first.expand(len(parts), *first.shape[1:])
    return torch.cat(parts)
