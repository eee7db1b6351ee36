"""What runs when: from a model and its data to its Fisher diagonal, in one backward pass a batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import replace

from torch import nn
from tqdm.auto import tqdm

from sparseft.fisher.batches import Batch, limited
from sparseft.fisher.interrupts import Interrupts
from sparseft.fisher.ledger import Ledger
from sparseft.fisher.loss import Loss, Mode, Objective, Reduction
from sparseft.fisher.one_pass import OnePass
from sparseft.fisher.parameters import other_names, scored_parameters, unwrapped
from sparseft.fisher.recomputation import recomputation
from sparseft.fisher.report import FisherReport, FisherScores, few, warn_of_fallback
from sparseft.fisher.resume import Continuation, fingerprint
from sparseft.fisher.sample_dim import SampleDim
from sparseft.fisher.state import evaluation
from sparseft.fisher.tally import Squares


def estimate_fisher(
    model: nn.Module,
    data: Iterable[Batch],
    *,
    samples: int | None = 1024,
    mode: Mode = "empirical",
    loss: Loss | None = None,
    token_reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    batch_dim: int | Mapping[str, int] | None = None,
    names: Iterable[str] | None = None,
    max_dropped: float = 0.05,
    resume: FisherScores | str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 300.0,
    seed: int = 0,
    progress: bool = True,
) -> FisherScores:
    """Estimate the diagonal of the Fisher information, exactly per sample: `(1/N) sum_n (d loss_n / d theta)^2`.

    The result does not depend on batch size, padding or order. The model runs in evaluation mode and is left as it was
    found: training flags, requires_grad, gradients, buffers, hooks. No per-sample gradient of a matrix is stored, but
    for parameters that no rule serves: of these, those of one sample are, or of as many as 32 MiB hold (256 MiB on a
    GPU), with a few copies on their way. Otherwise memory is that of a forward and backward pass plus the result, and
    at most as much as the result again: batches are kept, in case a sample's gradient turns out not to be finite,
    until they take more than it; then a second copy of the sums takes their place, as it does when there was such a
    sample. A checkpoint takes one more copy while it is written. Activation checkpointing is followed, with
    `use_reentrant=False`; layers of transformers that are checkpointed in training are checkpointed here too.

    Under autocast, around the call or inside the model, products are rounded as it rounds them, and scores are fp32
    sums. In bf16 they then agree with those of single samples, run one by one under the same autocast, to 2 % of a
    parameter's norm (4 % for experts, where rounding moves tokens), unless all its scores are tiny beside others'.

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
            transformers computes for a batch of one, or their "sum"; a sample is squared as a whole. "token" squares
            the gradient of every labelled token by itself and sums the squares over the tokens of a sample: another
            quantity, exact too, that takes as many backward passes a batch as its sample with most labels has. A
            `loss` of one's own then returns [N, T].
        label_smoothing: share of the target that is spread evenly over all classes, as in
            `torch.nn.functional.cross_entropy`; for mode "empirical".
        batch_dim: the dimension of the batch's tensors that counts samples, where it is not the first: one for all, or
            by name ({"src": 1}; "0" and "1" are the parts of a tuple). By default it is found by shape, if the shapes
            leave no doubt.
        names: the parameters to score; by default all that require gradients.
        max_dropped: the largest share of samples that may be left out because their gradient is not finite.
        resume: scores of earlier samples, or their file: the data go on after them, and the result is the mean over
            both, as if they had been one pass.
        checkpoint: a file to save to every `checkpoint_seconds` seconds and at the end. If it is there already, the
            pass goes on where it stopped: the samples it holds are skipped, and must be the first of the data again.
            Whole batches are also saved when the pass is interrupted or fails. Ctrl-C waits for the end of its batch
            for that; a second one does not. What an error in a backward pass, or a second Ctrl-C in one, leaves in
            the sums is not saved: the file then is what it was.
        checkpoint_seconds: see checkpoint.
        seed: of the draws of mode "sampled".
        progress: show a bar, if the pass takes longer than two seconds.

    Returns:
        Parameter name -> fp32 scores of its shape, in (loss of one sample / parameter)^2 (of one token, for "token"),
        with a `report` that says what that loss is. A warning names parameters that no rule serves: their gradients
        are made whole, of each sample; `report.fallback` has all of them with the reason, `report.way` says how.

    Raises:
        ValueError: no data; labels missing; a loss that is not one a sample or depends on other samples; too few
            samples with a finite gradient; names that are not the model's; earlier scores of something else.
        RuntimeError: activation checkpointing that cannot be followed: reentrant, or of regions that do something else
            when they run again.
    """
    if samples is not None and samples < 1:
        raise ValueError(f"samples must be at least 1, or None for all, got {samples}")
    if not 0 <= max_dropped <= 1:
        raise ValueError(f"max_dropped must be a share of the samples, in [0, 1], got {max_dropped}")
    model = unwrapped(model)
    parameters = scored_parameters(model, names)
    turned = SampleDim(batch_dim)
    objective = Objective(mode, loss, token_reduction, seed, label_smoothing=label_smoothing, samples=turned)
    report = FisherReport(
        mode, aliases=other_names(model, parameters), settings=dict(objective.settings), fingerprint=fingerprint(model)
    )
    past = Continuation(resume, checkpoint, checkpoint_seconds, parameters, report)
    run = OnePass(model, objective, parameters, report)
    ledger = Ledger(parameters, lambda sums, batch, positions: run.add(Squares(sums), batch, positions))

    def save(*, copy: bool) -> FisherScores:
        ledger.settle()
        scores = past.joined(_scores(ledger, run, objective, report, copy=copy))
        past.save(scores)
        return scores

    count = 0
    with Interrupts(active=past.saves) as interrupts:
        with (
            evaluation(model, parameters),
            recomputation(model),
            _rescued(ledger, past, save),
            _bar(data, samples, past.skipped, progress) as bar,
        ):
            for batch, positions in limited(data, samples, turned.first):
                count += len(positions)
                with interrupts.held():
                    batch, positions = past.rest(batch, positions)
                    if positions:
                        ledger.add(batch, positions)
                        past.check_settings()
                    past.done()
                bar.update(len(positions))
                # before its first batch, a pass that goes on has nothing that the checkpoint has not
                if past.due() and ledger.used:
                    save(copy=True)
            ledger.settle()
        past.end(count)
        with interrupts.held():
            scores = save(copy=False)
    _check_dropped(scores.report, max_dropped)
    warn_of_fallback(scores.report, len(scores), stacklevel=3)
    return scores


@contextmanager
def _rescued(ledger: Ledger, past: Continuation, save: Callable[..., FisherScores]) -> Iterator[None]:
    """Save the whole batches of a pass before an error or an interruption goes on, if they can be told apart."""
    try:
        yield
    except BaseException:
        if past.saves and ledger.used and ledger.whole() and not past.changed():
            save(copy=False)
        raise


def _scores(
    ledger: Ledger, run: OnePass, objective: Objective, report: FisherReport, *, copy: bool = False
) -> FisherScores:
    """Return the mean over a settled ledger's samples; without copy, in the memory of its sums."""
    used, dropped = sorted(ledger.used), sorted(ledger.dropped)
    rules = {name: run.rule(name) for name in ledger.sums}
    sums = {name: total.clone() for name, total in ledger.sums.items()} if copy else ledger.sums
    for name, total in sums.items():
        total.div_(max(len(used), 1))
        if "+" in rules[name]:
            # a tied weight's cross terms may leave -0.0000001 where 0 is meant
            total.clamp_(min=0)
    return FisherScores(
        sums, replace(report, loss=objective.description, positions=used, dropped=dropped, rules=rules)
    )


def _check_dropped(report: FisherReport, most: float) -> None:
    lost = len(report.dropped)
    if not report.samples:
        raise ValueError(
            f"at least one sample must have a finite loss and gradient, got none in {lost}; check the model's "
            "weights, its dtype and the labels"
        )
    if lost > most * report.seen:
        raise ValueError(
            f"at most {most:.1%} of the samples may be dropped as not finite, got {lost} of {report.seen}, at "
            f"{few(report.dropped)}; check these samples, their labels and the model's dtype, or raise max_dropped"
        )


def _bar(data: Iterable[Batch], samples: int | None, skipped: int, progress: bool) -> tqdm:
    available = getattr(data, "dataset", None)
    counts = [] if samples is None else [samples]
    if isinstance(available, Sized):
        counts.append(len(available))
    total = min(counts, default=None)
    return tqdm(total=total, initial=skipped, desc="Fisher", unit=" samples", delay=2, disable=not progress)
