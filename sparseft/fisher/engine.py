"""What runs when: from a model and its data to its Fisher diagonal, in one backward pass a batch."""

from __future__ import annotations

from collections.abc import Iterable, Sized

from torch import nn
from tqdm.auto import tqdm

from sparseft.fisher.batches import Batch, limited
from sparseft.fisher.ledger import Ledger
from sparseft.fisher.loss import Loss, Mode, Objective, Reduction
from sparseft.fisher.one_pass import OnePass
from sparseft.fisher.parameters import aliases, scored_parameters, unwrapped
from sparseft.fisher.report import FisherReport, FisherScores
from sparseft.fisher.state import evaluation, without_recomputation
from sparseft.fisher.tally import Squares


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
    run = OnePass(model, objective, parameters, report)
    ledger = Ledger(parameters, lambda sums, batch, positions: run.add(Squares(sums), batch, positions))
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


def _bar(data: Iterable[Batch], samples: int | None, progress: bool) -> tqdm:
    available = getattr(data, "dataset", None)
    counts = [] if samples is None else [samples]
    if isinstance(available, Sized):
        counts.append(len(available))
    total = min(counts, default=None)
    return tqdm(total=total, desc="Fisher", unit="sample", delay=2, disable=not progress)
