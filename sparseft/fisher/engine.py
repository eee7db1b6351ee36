"""What runs when: from a model and its data to its Fisher diagonal, in one backward pass a batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sparseft.fisher.batches import Batch, limited, take, to_device
from sparseft.fisher.capture import Capture, Use
from sparseft.fisher.fallback import add_one_by_one_
from sparseft.fisher.ledger import Ledger
from sparseft.fisher.loss import Loss, Mode, Objective, Reduction
from sparseft.fisher.parameters import aliases, scored_parameters, unwrapped
from sparseft.fisher.probe import Plan, probe
from sparseft.fisher.report import FisherReport, FisherScores
from sparseft.fisher.state import evaluation, without_recomputation
from sparseft.fisher.tally import Tally, mixed


def estimate_fisher(
    model: nn.Module,
    data: Iterable[Batch],
    *,
    samples: int | None = 1024,
    mode: Mode = "empirical",
    loss: Loss | None = None,
    token_reduction: Reduction = "mean",
    names: Iterable[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> FisherScores:
    """Estimate the diagonal of the Fisher information, exactly per sample: `(1/N) sum_n (d loss_n / d theta)^2`.

    The result does not depend on batch size, padding or order. The model runs in evaluation mode and is left as it was
    found: training flags, requires_grad, gradients, buffers, hooks. No per-sample gradient of a matrix is ever stored;
    memory is that of a forward and backward pass plus the result.
    Source: FISH Mask, arXiv 2111.09839, equation 4.

    Args:
        model: a transformers model with a classification, regression, token classification, masked or causal language
            modelling head; or any module, with (inputs, targets) as data or a `loss`.
        data: batches, as a DataLoader gives them: mappings with "labels", or (inputs, targets).
        samples: how many samples to use, from the start of the data; the last batch is cut. None means all.
        mode: "empirical": the loss at the given label. "expected": the exact expectation over the model's distribution
            of the label, for classification and regression. "sampled": at one label drawn from it, also for tokens.
            In the last two the loss is the negative log-likelihood; a regression head is the mean of a Gaussian of
            unit variance, whose loss is half the squared error.
        loss: a function of (model, batch) that returns one loss a sample, [N], in place of the head's own.
        token_reduction: a token-level loss is the "mean" over the labelled tokens of a sample, which is what
            transformers computes for a batch of one, or their "sum".
        names: the parameters to score; by default all that require gradients.
        seed: of the draws of mode "sampled".
        progress: show a bar, if the pass takes longer than two seconds.

    Returns:
        Parameter name -> fp32 scores of its shape, in (loss of one sample / parameter)^2, with a `report`.

    Raises:
        ValueError: no data; labels missing; a loss that is not one a sample or depends on other samples; no sample
            with a finite gradient; names that are not the model's.
    """
    if samples is not None and samples < 1:
        raise ValueError(f"samples must be at least 1, or None for all, got {samples}")
    model = unwrapped(model)
    parameters = scored_parameters(model, names)
    report = FisherReport(mode, aliases=aliases(model, parameters))
    objective = Objective(mode, loss, token_reduction, seed)
    run = _Pass(model, objective, parameters, report)
    ledger = Ledger(parameters, run.add)
    with evaluation(model, parameters), without_recomputation(), _bar(data, samples, progress) as bar:
        for batch, positions in limited(data, samples):
            ledger.add(batch, positions)
            bar.update(len(positions))
        ledger.close()
    report.positions, report.dropped = sorted(ledger.used), sorted(ledger.dropped)
    report.loss = objective.description
    if not report.positions:
        raise ValueError(
            f"at least one sample must have a finite loss and gradient, got none in {len(report.dropped)}; check the "
            "model's weights, its dtype and the labels"
        )
    for name, total in ledger.sums.items():
        report.rules[name] = run.rule(name)
        # a tied weight's cross terms may leave -0.0000001 where 0 is meant
        total.div_(report.samples).clamp_(min=0)
    return FisherScores(ledger.sums, report)


class _Pass:
    """Adds the squares of batches to sums: one captured backward pass, and the fallback for what escapes it."""

    def __init__(
        self, model: nn.Module, objective: Objective, parameters: Mapping[str, Tensor], report: FisherReport
    ) -> None:
        self._model, self._objective, self._parameters, self._report = model, objective, parameters, report
        self._device = next(model.parameters()).device
        self._plan: Plan | None = None
        self._rules: dict[str, set[str]] = {name: set() for name in parameters}

    def rule(self, name: str) -> str:
        """Return which rules served a parameter."""
        return " + ".join(sorted(self._rules[name])) or "unused"

    def add(self, sums: Mapping[str, Tensor], batch: Batch, positions: list[int]) -> list[int]:
        """Add a batch to sums; return the positions left out because their loss is not finite."""
        batch = to_device(batch, self._device)
        if self._plan is None:
            self._plan = probe(self._model, self._objective, batch, positions, self._parameters)
            if self._plan is None:
                return positions
        capture = Capture(self._parameters, self._plan.for_samples(len(positions)), len(positions))
        with capture:
            pullback = self._objective(self._model, batch, positions)
        finite = pullback.finite()
        if not bool(finite.all()):
            del pullback
            good = finite.nonzero()[:, 0].tolist()
            left_out = [position for index, position in enumerate(positions) if index not in good]
            if good:
                left_out += self.add(sums, take(batch, good), [positions[index] for index in good])
            return left_out
        escaped = {**capture.escaped(pullback.outputs), **mixed(capture.uses)}
        self._note(capture.uses, escaped)
        if pullback.outputs.requires_grad:
            tally = Tally(sums, capture.uses, escaped)
            capture.emit = tally
            while pullback.cotangents:
                cotangent = pullback.cotangents.pop(0)
                torch.autograd.grad(
                    pullback.outputs,
                    [capture.anchor],
                    cotangent,
                    retain_graph=bool(pullback.cotangents),
                    allow_unused=True,
                )
                tally.finish()
        if escaped:
            rest = {name: self._parameters[name] for name in escaped}
            add_one_by_one_(sums, self._model, self._objective, batch, positions, rest)
        return []

    def _note(self, uses: list[Use], escaped: Mapping[str, str]) -> None:
        for use in uses:
            if use.name not in escaped:
                self._rules[use.name].add(use.rule)
        for name, reason in escaped.items():
            self._rules[name].add("fallback")
            known = self._plan.fallback if self._plan is not None else {}
            self._report.fallback.setdefault(name, known.get(name, reason))


def _bar(data: Iterable[Batch], samples: int | None, progress: bool) -> tqdm:
    available = getattr(data, "dataset", None)
    counts = [] if samples is None else [samples]
    if isinstance(available, Sized):
        counts.append(len(available))
    total = min(counts, default=None)
    return tqdm(total=total, desc="Fisher", unit="sample", delay=2, disable=not progress)
