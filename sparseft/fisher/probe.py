"""Probing: two small runs decide, before anything is counted, which uses of which parameters can be captured.

Two batch sizes show where the batch dimension is: the leading size of a use must grow with it. Then the loss of one
sample alone is backpropagated: its gradient must reach the rows of that sample only, in every captured use. A layout
in which samples alternate, a table shared by the batch, tokens gathered across samples: all fail one of the two and
go to the fallback.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparseft.fisher.batches import Batch, take
from sparseft.fisher.capture import Capture, Layout, Use
from sparseft.fisher.contribution import Contribution, Outer
from sparseft.fisher.coupling import check_uncoupled, coupled
from sparseft.fisher.loss import Objective, Pullback
from sparseft.fisher.patches import Patches
from sparseft.fisher.tally import mixed

# as few as can show it: the probe is overhead, of about an eighth of a pass over 16 samples
_SMALL, _LARGE = 1, 2
# shape errors of a model that cannot take per-sample positions where it expects shared ones
_MISFIT = (RuntimeError, ValueError, IndexError, TypeError)


@dataclass
class Plan:
    """Which uses are captured, (name, occurrence) -> layout, and which parameters are not, name -> reason."""

    layouts: dict[tuple[str, int], Layout] = field(default_factory=dict)
    fallback: dict[str, str] = field(default_factory=dict)

    def for_samples(self, samples: int) -> _Proven:
        """Return the policy for a batch of N samples."""
        return _Proven(self, samples)


@dataclass
class _Proven:
    plan: Plan
    samples: int

    def layout(self, name: str, occurrence: int, rows: int, shareable: bool) -> Layout | None:
        layout = self.plan.layouts.get((name, occurrence))
        fits = {
            None: False,
            Layout.BATCH: rows == self.samples,
            Layout.FLAT: rows % self.samples == 0,
            Layout.SHARED: shareable,
        }[layout]
        return layout if fits and name not in self.plan.fallback else None


@dataclass
class _Observe:
    """Captures nothing; notes the leading sizes."""

    rows: dict[tuple[str, int], int] = field(default_factory=dict)

    def layout(self, name: str, occurrence: int, rows: int, shareable: bool) -> Layout | None:
        self.rows[name, occurrence] = rows
        return None


@dataclass
class _Candidates:
    """Captures what may be captured, and notes how many samples' gradients must prove it."""

    before: dict[tuple[str, int], int]
    sharing: bool
    layouts: dict[tuple[str, int], Layout] = field(default_factory=dict)
    proofs: dict[tuple[str, int], int] = field(default_factory=dict)

    def layout(self, name: str, occurrence: int, rows: int, shareable: bool) -> Layout | None:
        key = (name, occurrence)
        before = self.before.get(key, 0)
        layout, proofs = (Layout.BATCH if rows == _LARGE else Layout.FLAT), 1
        if rows * _SMALL == before * _LARGE:
            # a leading size that is the batch size at two batch sizes needs no more: a zero-initialised adapter passes
            proofs = 0 if rows == _LARGE else 1
        elif before == rows and shareable and self.sharing:
            # expanded ids may be taken for the first sample's, or the last's, further on: only all gradients tell
            layout, proofs = Layout.SHARED, _LARGE
        elif self.sharing and rows % _LARGE == 0:
            # it may follow from shared ids that are expanded now and were not in the small run
            proofs = _LARGE
        else:
            return None
        self.layouts[key], self.proofs[key] = layout, proofs
        return layout


class _Untelling(Exception):
    """A probed sample has no gradient, or none that is finite: it proves nothing."""


def probe(
    model: nn.Module, objective: Objective, batch: Batch, positions: list[int], parameters: Mapping[str, Tensor]
) -> Plan | None:
    """Return the plan, or None if no sample of the batch has a finite loss."""
    probing = _Probing(model, objective, batch, positions, parameters)
    try:
        return probing.plan(list(range(min(len(positions), _LARGE))), strict=True)
    except _Untelling:
        # only now is a look at the whole batch worth its time
        chosen = probing.telling()
        return probing.plan(chosen, strict=False) if chosen else None


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
        for sharing in (True, False):
            candidates = _Candidates(observed.rows, sharing)
            capture = Capture(self.parameters, candidates, _LARGE)
            try:
                outputs = self._run(large, capture, strict)
            except _MISFIT as error:
                if sharing:
                    continue
                raise ValueError(
                    f"the model must run on a batch of {_LARGE} samples, which shows where the samples lie, but it "
                    f"failed: {error}; for a transformers model, setting config.pad_token_id is the usual remedy"
                ) from error
            plan, eps = _isolate(capture, candidates, outputs)
            together = outputs.detach()[-1]
            # rounding differs with the batch size; a gradient to other samples' rows was looked for, at any size
            tolerance = max(0.01, eps**0.5)
            if torch.allclose(together, alone, rtol=tolerance, atol=tolerance):
                if plan.fallback:
                    rest = {name: self.parameters[name] for name in plan.fallback}
                    check_uncoupled(self.model, self.objective, self.batch, self.positions, large, rest, eps)
                return plan
        raise coupled(f"its value changed from {alone.tolist()} to {together.tolist()}")

    def _run(self, samples: list[int], capture: Capture, strict: bool) -> Tensor:
        with capture:
            pullback = self.objective(
                self.model, take(self.batch, samples), [self.positions[sample] for sample in samples]
            )
        if strict and not bool(_telling(pullback).all()):
            raise _Untelling
        return pullback.outputs


def _telling(pullback: Pullback) -> Tensor:
    # a sample whose labels are all ignored has loss 0 and no gradient
    return pullback.finite() & pullback.outputs.reshape(len(pullback.outputs), -1).ne(0).any(1)


def _isolate(capture: Capture, candidates: _Candidates, outputs: Tensor) -> tuple[Plan, float]:
    """Backpropagate single samples; return what stayed in its own sample, and the coarsest precision met."""
    reached: dict[Use, set[int]] = {use: set() for use in capture.uses}
    refused: dict[str, str] = {}
    eps = torch.finfo(outputs.dtype).eps
    sample = 0

    def emit(use: Use, part: Contribution) -> None:
        nonlocal eps
        if isinstance(part, (Outer, Patches)):
            eps = max(eps, torch.finfo(part.left.dtype).eps)
        reaches = part.reaches().tolist()
        if reaches[sample]:
            reached[use].add(sample)
        if sum(reaches) > reaches[sample]:
            refused[use.name] = f"its {use.rule} rule cannot tell the samples apart"

    capture.emit = emit

    def unproven() -> list[Use]:
        return [use for use in capture.uses if len(reached[use]) < candidates.proofs[use.name, use.occurrence]]

    for sample in range(_LARGE if outputs.requires_grad else 0):
        single = torch.zeros_like(outputs)
        single[sample] = 1
        torch.autograd.grad(outputs, [capture.anchor], single, retain_graph=True, allow_unused=True)
        if not unproven() and not capture.repeated:
            break
    for use in unproven():
        refused.setdefault(use.name, "no gradient reached it to show where the samples lie")
    return Plan(candidates.layouts, {**capture.escaped(outputs), **mixed(capture.uses), **refused}), eps
