"""One batch: a captured backward pass, the fallback for what escapes it, and a sink that takes what both find.

What is wanted of the per-sample gradients is the sink's business: their squares, summed over samples (`Squares`), or
themselves, at chosen entries.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from sparseft.fisher.batches import Batch, take, to_device
from sparseft.fisher.capture import Capture, Use
from sparseft.fisher.contribution import Contribution
from sparseft.fisher.fallback import Fallback
from sparseft.fisher.loss import Objective, Pullback
from sparseft.fisher.probe import Plan, compare, probe
from sparseft.fisher.report import FisherReport
from sparseft.fisher.tally import mixed


class Receiver(Protocol):
    """Takes the contributions of a batch's backward passes, one pass after the other."""

    def __call__(self, use: Use, part: Contribution) -> None:
        """Take what one use of a parameter contributes to its per-sample gradients."""

    def finish(self) -> None:
        """End a backward pass: uses that did not report have no gradient in it."""


class Sink(Protocol):
    """Where a pass puts per-sample gradients."""

    def receiver(self, uses: list[Use], ignored: Collection[str], positions: list[int]) -> Receiver:
        """Return what takes the contributions of a batch: of its uses, those of ignored parameters left out."""

    def add_whole(self, positions: list[int], grads: Mapping[str, Tensor]) -> None:
        """Add whole gradients [n, ...] of the samples that stand at n positions in the data."""


class OnePass:
    """Takes batches, each through one forward pass and as many backward passes as the mode of the loss needs.

    Args:
        model: in evaluation mode, with gradients for the parameters alone.
        objective: what is differentiated.
        parameters: those whose per-sample gradients are wanted, by name.
        report: where fallbacks are noted, and the dtype of autocast.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, parameters: Mapping[str, Tensor], report: FisherReport
    ) -> None:
        self._model, self._objective, self._parameters, self._report = model, objective, parameters, report
        self._device = next(model.parameters()).device
        self._plan: Plan | None = None
        self._fallback = Fallback(model, objective)
        self._rules: dict[str, set[str]] = {name: set() for name in parameters}

    def rule(self, name: str) -> str:
        """Return which rules served a parameter."""
        return " + ".join(sorted(self._rules[name])) or "unused"

    def add(self, sink: Sink, batch: Batch, positions: list[int]) -> list[int]:
        """Put a batch's per-sample gradients into the sink.

        positions: where its samples stand in the data. Returns those left out because their loss is not finite.
        """
        batch = to_device(batch, self._device)
        if self._plan is None:
            self._plan = probe(self._model, self._objective, batch, positions, self._parameters)
            if self._plan is None:
                return positions
        compare(self._model, self._objective, batch, positions, self._parameters, self._plan)
        capture = Capture(self._parameters, self._plan.for_samples(len(positions)), len(positions))
        with capture:
            capture.shared.feed(batch)
            pullback = self._objective(self._model, batch, positions)
        if capture.autocast is not None:
            self._report.settings["autocast"] = str(capture.autocast).removeprefix("torch.")
        finite = pullback.finite()
        if not bool(finite.all()):
            del pullback
            good = finite.nonzero()[:, 0].tolist()
            left_out = [position for index, position in enumerate(positions) if index not in good]
            if good:
                left_out += self.add(sink, take(batch, good), [positions[index] for index in good])
            return left_out
        escaped = {**capture.escaped(pullback.outputs), **mixed(capture.uses)}
        self._note(capture.uses, escaped)
        if pullback.outputs.requires_grad:
            whole = Pullback(pullback.outputs.detach(), list(pullback.cotangents if escaped else []), pullback.targets)
            receiver = sink.receiver(capture.uses, escaped, positions)
            capture.emit = receiver
            while pullback.cotangents:
                cotangent = pullback.cotangents.pop(0)
                capture.backward(pullback.outputs, cotangent, retain_graph=bool(pullback.cotangents))
                receiver.finish()
            del pullback
            if whole.cotangents:
                rest = {name: self._parameters[name] for name in escaped}
                eps = max(self._plan.eps, 0.0 if capture.autocast is None else torch.finfo(capture.autocast).eps)
                composed = capture.shared.composed.nbytes(rest)
                for samples, grads in self._fallback.gradients(batch, whole, rest, composed, eps):
                    sink.add_whole([positions[index] for index in samples], grads)
                self._report.way = self._fallback.way
        return []

    def _note(self, uses: list[Use], escaped: Mapping[str, str]) -> None:
        for use in uses:
            if use.name not in escaped:
                self._rules[use.name].add(use.rule)
        for name, reason in escaped.items():
            self._rules[name].add("fallback")
            known = self._plan.fallback if self._plan is not None else {}
            self._report.fallback.setdefault(name, known.get(name, reason))
