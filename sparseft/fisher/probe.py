"""Probing: two small runs decide, before anything is counted, which uses of which parameters can be captured.

Two batch sizes show where the batch dimension is: the leading size of a use must grow with it. Then the loss of one
sample alone is backpropagated: its gradient must reach the rows of that sample only, in every captured use and in
every copy of what all samples share. Samples in another order, tokens gathered across samples: what fails one of the
two goes to the fallback. Last, each sample's loss must be the same beside a copy of itself, see `coupling`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparseft.fisher.batches import Batch, take
from sparseft.fisher.capture import Capture, Use
from sparseft.fisher.contribution import Contribution, Outer, Vector
from sparseft.fisher.coupling import check_same, check_uncoupled, company, coupled, same
from sparseft.fisher.excerpt import excerpt
from sparseft.fisher.fan_out import FanOut
from sparseft.fisher.layout import Layout, fits
from sparseft.fisher.loss import Objective, Pullback
from sparseft.fisher.patches import Patches
from sparseft.fisher.refusal import Refusal
from sparseft.fisher.shared import Source
from sparseft.fisher.tally import mixed

# as few as can show it: the probe is overhead, of about an eighth of a pass over 16 samples
_SMALL, _LARGE = 1, 2
# shape errors of a model that cannot run on so few samples
_MISFIT = (RuntimeError, ValueError, IndexError, TypeError)


@dataclass
class Plan:
    """Which uses are captured, (name, occurrence) -> layout, and which parameters are not, name -> reason.

    fan_outs: where tensors shared by all samples meet the batch, (names of their parameters, occurrence) -> how.
    eps: of the coarsest precision met; compared: two samples that differ were seen not to depend on each other.
    """

    layouts: dict[tuple[str, int], Layout] = field(default_factory=dict)
    fan_outs: dict[tuple[frozenset[str], int], FanOut] = field(default_factory=dict)
    fallback: dict[str, str] = field(default_factory=dict)
    eps: float = 0.0
    compared: bool = False

    def for_samples(self, samples: int) -> _Proven:
        """Return the policy for a batch of N samples."""
        return _Proven(self, samples)


@dataclass
class _Proven:
    plan: Plan
    samples: int

    def layout(self, name: str, occurrence: int, sizes: tuple[int, ...], source: Source) -> Layout | None:
        layout = self.plan.layouts.get((name, occurrence))
        alone = layout is Layout.ALONE
        if name in self.plan.fallback or source is (Source.BATCH if alone else Source.PARAMETERS):
            return None
        return layout if fits(layout, sizes, self.samples) else None

    def fan_out(
        self, names: frozenset[str], occurrence: int, sizes: tuple[int, int], with_batch: bool
    ) -> FanOut | None:
        place = self.plan.fan_outs.get((names, occurrence))
        return place if place is not None and fits(place.layout, sizes, self.samples) else None


@dataclass
class _Observe:
    """Captures nothing; notes the leading sizes."""

    sizes: dict[tuple[str, int], tuple[int, ...]] = field(default_factory=dict)

    def layout(self, name: str, occurrence: int, sizes: tuple[int, ...], source: Source) -> Layout | None:
        self.sizes[name, occurrence] = sizes
        return None

    def fan_out(
        self, names: frozenset[str], occurrence: int, sizes: tuple[int, int], with_batch: bool
    ) -> FanOut | None:
        return None


@dataclass
class _Candidates:
    """Captures what may be captured, and notes how many samples' gradients must prove it."""

    before: dict[tuple[str, int], tuple[int, ...]]
    proofs: dict[tuple[str, int], int] = field(default_factory=dict)

    def layout(self, name: str, occurrence: int, sizes: tuple[int, ...], source: Source) -> Layout | None:
        key = (name, occurrence)
        # what is computed from parameters alone is proven where it meets the batch
        layout = Layout.ALONE if source is Source.PARAMETERS else self._growing(self.before.get(key), sizes)
        if layout is Layout.ALONE and source is Source.BATCH:
            return None
        if layout is not None:
            # a leading size that is the batch size at two batch sizes needs no more: a zero-initialised adapter passes
            self.proofs[key] = 0 if layout in (Layout.ALONE, Layout.BATCH) else 1
        return layout

    @staticmethod
    def _growing(before: tuple[int, ...] | None, sizes: tuple[int, ...]) -> Layout | None:
        if before is None or len(before) != len(sizes):
            return None
        grows = [now * _SMALL == then * _LARGE for then, now in zip(before, sizes, strict=True)]
        if grows[0]:
            return Layout.BATCH if sizes[0] == _LARGE else Layout.FLAT
        if before == sizes:
            return Layout.ALONE
        if len(sizes) > 1 and before[0] == sizes[0] and grows[1] and sizes[1] == _LARGE:
            return Layout.SECOND
        return None

    def fan_out(
        self, names: frozenset[str], occurrence: int, sizes: tuple[int, int], with_batch: bool
    ) -> FanOut | None:
        for layout in (Layout.BATCH, Layout.SECOND, *([Layout.FLAT] if with_batch else [])):
            if fits(layout, sizes, _LARGE):
                return FanOut(names, occurrence, layout)
        return None


class _Untelling(Exception):
    """A probed sample has no gradient, or none that is finite: it proves nothing."""


def probe(
    model: nn.Module, objective: Objective, batch: Batch, positions: list[int], parameters: Mapping[str, Tensor]
) -> Plan | None:
    """Return the plan, or None if no sample of the batch has a finite loss."""
    short = excerpt(batch)
    if short is not None:
        # what an excerpt does not settle, the whole batch does, errors included
        with contextlib.suppress(_Untelling, *_MISFIT):
            plan = _Probing(model, objective, short, positions, parameters).plan(company(short), strict=True)
            if not plan.fallback:
                return plan
    probing = _Probing(model, objective, batch, positions, parameters)
    try:
        return probing.plan(company(batch), strict=True)
    except _Untelling:
        # only now is a look at the whole batch worth its time
        chosen = probing.telling()
        pair = [chosen[index] for index in company(take(batch, chosen))] if chosen else []
        return probing.plan(pair, strict=False) if pair else None


def compare(
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    positions: list[int],
    parameters: Mapping[str, Tensor],
    plan: Plan,
) -> None:
    """Look for two samples of a batch that show whether they depend on each other, if the plan's did not show it.

    Raises:
        ValueError: they do.
    """
    if plan.compared:
        return
    chosen = company(batch)
    if len(chosen) == _LARGE:
        _Probing(model, objective, batch, positions, parameters).compare(chosen, plan)


@dataclass
class _Probing:
    model: nn.Module
    objective: Objective
    batch: Batch
    positions: list[int]
    parameters: Mapping[str, Tensor]

    def telling(self) -> list[int]:
        """Return the samples whose gradient proves something, or else those that are finite at least."""
        with torch.no_grad():
            pullback = self.objective(self.model, self.batch, self.positions)
        finite, telling = pullback.finite(), _telling(pullback)
        return (telling if telling.any() else finite).nonzero()[:, 0].tolist()

    def plan(self, chosen: list[int], strict: bool) -> Plan:
        """Return the plan that runs of the chosen samples show; strict: raise _Untelling where one shows nothing."""
        # the first of the small run is the last of the large one
        small = [chosen[(_LARGE - 1 + i) % len(chosen)] for i in range(_SMALL)]
        large = [chosen[i % len(chosen)] for i in range(_LARGE)]
        observed = _Observe()
        alone = self._run(small, Capture(self.parameters, observed, _SMALL), strict).detach()[0]
        candidates = _Candidates(observed.sizes)
        capture = Capture(self.parameters, candidates, _LARGE)
        try:
            outputs = self._run(large, capture, strict)
        except Refusal:
            raise
        except _MISFIT as error:
            raise ValueError(
                f"the model must run on a batch of {_LARGE} samples, which shows where the samples lie, but it "
                f"failed: {error}; for a transformers model, setting config.pad_token_id is the usual remedy"
            ) from error
        isolation = _Isolation(capture, candidates.proofs)
        plan = isolation.plan(outputs)
        together = outputs.detach()[-1]
        # rounding differs with the batch size; a gradient to other samples' rows was looked for, at any size
        tolerance = max(0.01, isolation.eps**0.5)
        if not torch.allclose(together, alone, rtol=tolerance, atol=tolerance):
            raise coupled(f"its value changed from {alone.tolist()} to {together.tolist()}")
        plan.eps = isolation.eps
        if len(chosen) > 1:
            self.compare(large, plan, outputs.detach())
        return plan

    def compare(self, chosen: list[int], plan: Plan, outputs: Tensor | None = None) -> None:
        """Raise if one of two samples depends on the other.

        outputs: of the two, as the plan has them captured, if they are known.
        """
        if plan.fallback:
            rest = {name: self.parameters[name] for name in plan.fallback}
            for place in range(len(chosen)):
                check_uncoupled(self.model, self.objective, self.batch, self.positions, chosen, place, rest, plan.eps)
        else:
            beside = self._outputs(chosen, plan) if outputs is None else outputs
            for index, sample in enumerate(chosen):
                itself = [sample] * _LARGE
                # the model alone takes half as long, but may round otherwise: only the same kernels prove a difference
                if not same(beside[index], self._plain(itself)[index], plan.eps):
                    check_same(beside[index], self._outputs(itself, plan)[index], plan.eps)
        plan.compared = True

    def _plain(self, chosen: list[int]) -> Tensor:
        positions = [self.positions[sample] for sample in chosen]
        with torch.no_grad():
            return self.objective(self.model, take(self.batch, chosen), positions).outputs

    def _outputs(self, chosen: list[int], plan: Plan) -> Tensor:
        capture = Capture(self.parameters, plan.for_samples(len(chosen)), len(chosen))
        return self._run(chosen, capture, strict=False).detach()

    def _run(self, samples: list[int], capture: Capture, strict: bool) -> Tensor:
        batch = take(self.batch, samples)
        with capture:
            capture.shared.feed(batch)
            pullback = self.objective(self.model, batch, [self.positions[sample] for sample in samples])
        if strict and not bool(_telling(pullback).all()):
            raise _Untelling
        return pullback.outputs


def _telling(pullback: Pullback) -> Tensor:
    # a sample whose labels are all ignored has loss 0 and no gradient
    return pullback.finite() & pullback.outputs.reshape(len(pullback.outputs), -1).ne(0).any(1)


class _Isolation:
    """Backpropagates single samples: what is captured must keep each in its own rows.

    Attributes:
        eps: of the coarsest precision met.
    """

    def __init__(self, capture: Capture, proofs: dict[tuple[str, int], int]) -> None:
        self.eps = 0.0
        self._capture = capture
        self._sample = 0
        self._reached: dict[Use | FanOut, set[int]] = {}
        self._strayed: set[Use | FanOut] = set()
        # a copy may be taken for the first sample's, or the last's, further on: only all gradients tell
        self._needed: dict[Use | FanOut, int] = dict.fromkeys(capture.shared.fan_outs, _LARGE)
        self._watched: set[Use | FanOut] = set()  # what this gradient may prove, or prove wrong
        for use in capture.uses:
            if use.layout is not Layout.ALONE:
                self._needed[use] = proofs[use.name, use.occurrence]
        # where samples may alternate, the rows that one's gradient reaches may lie in its part by accident
        self._all = capture.repeated or any(use.layout is Layout.FLAT for use in self._needed)
        capture.emit = self._note
        capture.shared.witness = lambda fan_out, grads: self._note(fan_out, Vector(grads.reshape(len(grads), -1)))

    def plan(self, outputs: Tensor) -> Plan:
        """Return what is proven by the gradients of these outputs."""
        self.eps = torch.finfo(outputs.dtype).eps
        self._backpropagate(outputs)
        if self._strayed:
            # the same size fits a batch whose samples alternate
            again = [use for use in self._strayed if use.layout is Layout.FLAT]
            for use in again:
                use.layout = Layout.INTERLEAVED
            if again:
                self._backpropagate(outputs)
        capture, refused = self._capture, self._refused()
        plan = Plan(fallback={**capture.escaped(outputs), **mixed(capture.uses), **refused})
        plan.layouts = {(use.name, use.occurrence): use.layout for use in capture.uses}
        plan.fan_outs = {(fan_out.names, fan_out.occurrence): fan_out for fan_out in capture.shared.fan_outs}
        capture.stop()
        return plan

    def _backpropagate(self, outputs: Tensor) -> None:
        self._strayed.clear()
        self._reached = {use: set() for use in self._needed}
        self._watched = set(self._needed)
        for self._sample in range(_LARGE if outputs.requires_grad else 0):
            single = torch.zeros_like(outputs)
            single[self._sample] = 1
            torch.autograd.grad(outputs, [self._capture.anchor], single, retain_graph=True, allow_unused=True)
            self._capture.shared.forget()
            if not self._all:
                self._watched = set(self._unproven())
            if not self._watched:
                break

    def _note(self, use: Use | FanOut, part: Contribution) -> None:
        if use not in self._watched:
            return  # proven; or shared, and in the way of the batch's own gradient: it escaped
        if isinstance(part, (Outer, Patches)):
            self.eps = max(self.eps, torch.finfo(part.left.dtype).eps)
        reaches = part.reaches().tolist()
        if reaches[self._sample]:
            self._reached[use].add(self._sample)
        if sum(reaches) > reaches[self._sample]:
            self._strayed.add(use)

    def _unproven(self) -> list[Use | FanOut]:
        return [use for use, needed in self._needed.items() if len(self._reached[use]) < needed]

    def _refused(self) -> dict[str, str]:
        refused: dict[str, str] = {}
        for use in self._unproven():
            for name in use.names:
                refused[name] = "no gradient reached it to show where the samples lie"
        for use in self._strayed:
            for name in use.names:
                rule = use.rule if isinstance(use, Use) else "shared"
                refused[name] = f"its {rule} rule cannot tell the samples apart"
        return refused
