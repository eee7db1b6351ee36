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
from sparseft.fisher.loss import Objective
from sparseft.fisher.tally import mixed

_SMALL, _LARGE = 2, 3
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
            layout = Layout.SHARED
        elif self.sharing and rows % _LARGE == 0:
            # it may follow from shared ids that are expanded now and were not in the small run
            proofs = _LARGE
        else:
            return None
        self.layouts[key], self.proofs[key] = layout, proofs
        return layout


def probe(
    model: nn.Module, objective: Objective, batch: Batch, positions: list[int], parameters: Mapping[str, Tensor]
) -> Plan | None:
    """Return the plan, or None if no sample of the batch has a finite loss."""
    with torch.no_grad():
        pullback = objective(model, batch, positions)
    finite = pullback.finite()
    # a sample whose labels are all ignored has loss 0 and no gradient, and proves nothing
    telling = finite & pullback.outputs.reshape(len(finite), -1).ne(0).any(1)
    chosen = (telling if telling.any() else finite).nonzero()[:, 0].tolist()
    if not chosen:
        return None

    def run(samples: list[int], capture: Capture) -> Tensor:
        with capture:
            return objective(model, take(batch, samples), [positions[i] for i in samples]).outputs

    # the first of the small run is the last of the large one, if there are three
    small = [chosen[(2 + i) % len(chosen)] for i in range(_SMALL)]
    large = [chosen[i % len(chosen)] for i in range(_LARGE)]
    observed = _Observe()
    try:
        alone = run(small, Capture(parameters, observed, _SMALL)).detach()[0]
    except _MISFIT as error:
        raise ValueError(
            f"the model must run on a batch of {_SMALL} samples, which shows where the samples lie, but it failed: "
            f"{error}; for a transformers model, setting config.pad_token_id is the usual remedy"
        ) from error
    for sharing in (True, False):
        candidates = _Candidates(observed.rows, sharing)
        capture = Capture(parameters, candidates, _LARGE)
        try:
            outputs = run(large, capture)
        except _MISFIT:
            if not sharing:
                raise
            continue
        plan, eps = _isolate(capture, candidates, outputs)
        together = outputs.detach()[large.index(small[0])]
        # rounding differs with the batch size; a gradient to other samples' rows was looked for above, at any size
        tolerance = max(0.01, eps**0.5)
        if torch.allclose(together, alone, rtol=tolerance, atol=tolerance):
            return plan
    raise ValueError(
        f"the loss of a sample must depend on that sample alone, but it changed from {alone.tolist()} to "
        f"{together.tolist()} with the other samples of its batch; losses across a batch, batch statistics and "
        "randomness in evaluation mode have no per-sample gradient"
    )


def _isolate(capture: Capture, candidates: _Candidates, outputs: Tensor) -> tuple[Plan, float]:
    """Backpropagate single samples; return what stayed in its own sample, and the coarsest precision met."""
    reached: dict[Use, set[int]] = {use: set() for use in capture.uses}
    refused: dict[str, str] = {}
    eps = torch.finfo(outputs.dtype).eps
    sample = 0

    def emit(use: Use, part: Contribution) -> None:
        nonlocal eps
        if isinstance(part, Outer):
            eps = max(eps, torch.finfo(part.left.dtype).eps)
        reaches = part.reaches().tolist()
        if reaches[sample]:
            reached[use].add(sample)
        if sum(reaches) > reaches[sample]:
            refused[use.name] = f"its {use.rule} rule cannot tell the samples apart"

    capture.emit = emit
    for sample in range(_LARGE if outputs.requires_grad else 0):
        single = torch.zeros_like(outputs)
        single[sample] = 1
        torch.autograd.grad(outputs, [capture.anchor], single, retain_graph=True, allow_unused=True)
    for use in capture.uses:
        if len(reached[use]) < candidates.proofs[use.name, use.occurrence]:
            refused.setdefault(use.name, "no gradient reached it to show where the samples lie")
    return Plan(candidates.layouts, {**capture.escaped(outputs), **mixed(capture.uses), **refused}), eps
